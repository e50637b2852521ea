"""Answer the questions of a secure fingerprint at a site, and refuse others.

The questions, their order, and the results of a sum are in `federated/aggregation/fingerprint_sums.py`; the vectors
made here are masked before they leave (`federated/site/masking.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunetv2.experiment_planning.dataset_fingerprint.case_sample import CaseSample
from nnunetv2.federated.aggregation import fingerprint_statistics, fingerprint_sums, geometry_quantiles, outermost
from nnunetv2.federated.aggregation.case_table import Case
from nnunetv2.federated.aggregation.integer_moments import integer_sums, to_words
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.exchanges import plausibility
from nnunetv2.federated.protocol.secure_fingerprint_messages import (
    CaseTable,
    CoarseHistograms,
    DigitCounts,
    FineHistograms,
    Geometry,
    NextSum,
)
from nnunetv2.utilities.plain_text import show


class FingerprintAnswers:
    """The vectors of one site for the sums of a fingerprint, question by question.

    Args:
        samples: Of all cases of this site.
        intensities: Per channel, values (float32) and how often each occurs.
        num_cases: Cases of all sites.
        others: How many values of a channel the other sites may have together.
        geometry: The form in which the federation tells spacings and shapes.

    Raises:
        StatisticsError: A case has an impossible spacing: behind masks, nobody else would notice.
    """

    def __init__(
        self,
        samples: Sequence[CaseSample],
        intensities: Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        num_cases: int,
        others: int,
        geometry: Geometry,
    ) -> None:
        self._intensities = intensities
        self._channels = [outermost.Channel.of(*channel, hide=True) for channel in intensities]
        self._cases = sorted(
            Case(_triple(sample.spacing), _whole_triple(sample.shape_after_crop), float(sample.relative_size))
            for sample in samples
        )
        plausibility.check_geometry(
            [case.spacing for case in self._cases], [case.relative_size for case in self._cases]
        )
        self._promotes_to_float64 = not all(sample.has_foreground for sample in samples)
        self._num_cases = num_cases
        self._others = others
        self._geometry = geometry
        self._asked: NextSum = fingerprint_sums.FIRST
        self._looks = 0

    @property
    def cases(self) -> Sequence[Case]:
        """The cases of this site, sorted."""
        return self._cases

    @property
    def asked(self) -> NextSum:
        """The question that is open."""
        return self._asked

    def proceed(self, asked: NextSum) -> None:
        """Take in the next question.

        Raises:
            FederationError: It does not follow from the last one, or tells more than a fingerprint takes.
        """
        question = asked.question
        if isinstance(question, FineHistograms):
            self._look_into(question)
        elif not self._follows(question):
            raise FederationError(
                f"the coordinator wants to add up {question.what!r} after {self._asked.question.what!r}, which the "
                f"fingerprint of a federation with --geometry {self._geometry} does not need: nothing more is sent. "
                "Ask the coordinating site which version it runs"
            )
        self._asked = asked

    def vector(self) -> np.ndarray:
        """Return the answer, uint64."""
        question = self._asked.question
        if isinstance(question, CoarseHistograms):
            return fingerprint_sums.coarse_vector([channel.coarse_histogram() for channel in self._channels])
        if isinstance(question, FineHistograms):
            return fingerprint_sums.fine_vector(
                [self._fine_channel(question, number) for number in range(len(self._channels))],
                promotes_to_float64=self._promotes_to_float64,
            )
        if isinstance(question, CaseTable):
            return fingerprint_sums.cases_vector(self._cases, question, num_cases=self._num_cases)
        spacings, shapes, sizes = zip(*self._cases, strict=True)
        return fingerprint_sums.digits_vector(geometry_quantiles.quantities_of_cases(spacings, shapes, sizes), question)

    def _fine_channel(self, question: FineHistograms, number: int) -> fingerprint_sums.FineChannel:
        values, counts = self._intensities[number]
        return fingerprint_sums.FineChannel(
            to_words(*integer_sums(values, counts, question.steps[number])),
            self._channels[number].coarse_histogram(),
            fingerprint_statistics.fine_histogram(values, question.bins[number], counts),
        )

    def _look_into(self, question: FineHistograms) -> None:
        """Show as many of the outermost values as these bins take; see `outermost`."""
        self._looks += 1
        is_expected = isinstance(self._asked.question, CoarseHistograms | FineHistograms)
        if not is_expected or self._looks > outermost.MOST_LOOKS or len(question.bins) != len(self._channels):
            raise FederationError(
                "the coordinator wants to look into intensities that no percentile needs: nothing more is sent. Ask "
                "the coordinating site which version it runs"
            )
        for channel, wanted in zip(self._channels, question.bins):
            channel.check_wanted_bins(wanted, self._others)
        shown = [channel.showing(wanted) for channel, wanted in zip(self._channels, question.bins)]
        fewer = [str(c) for c, channel in enumerate(shown) if channel is not self._channels[c]]
        if fewer:
            show(
                "A percentile of all sites' intensities lies among this site's outermost values, in channel "
                f"{', '.join(fewer)}: more of these values are counted where they are, in the sum of all sites.",
                flush=True,
            )
        self._channels = shown

    def _follows(self, question: fingerprint_sums.Question) -> bool:
        """Tell whether a question about geometry is the one that comes next."""
        before = self._asked.question
        if isinstance(question, CaseTable) and self._geometry == "list":
            return question.doublings == (before.doublings + 1 if isinstance(before, CaseTable) else 0)
        if not isinstance(question, DigitCounts) or self._geometry != "quantiles":
            return False
        if isinstance(before, DigitCounts):
            return extends(question, before)
        return question.level == 0 and question.branches == geometry_quantiles.roots(geometry_quantiles.OF_CASES)


def extends(question: DigitCounts, before: DigitCounts) -> bool:
    """Tell whether digits are asked for only behind those of the question before."""
    return (
        question.level == before.level + 1
        and len(question.branches) == len(before.branches)
        and all(
            {branch.prefix >> 16 for branch in now} <= {branch.prefix for branch in then}
            for now, then in zip(question.branches, before.branches, strict=True)
        )
    )


def _triple(lengths: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = map(float, lengths)
    return first, second, third


def _whole_triple(lengths: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = map(int, lengths)
    return first, second, third
