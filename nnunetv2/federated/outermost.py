"""Keep a site's smallest and largest voxels to itself: count its outermost values a little further inside.

A histogram of all values begins with the smallest and ends with the largest voxel of single patients. So a site clips
the outermost ten thousandth of its values, at either end, to the last value inside, and counts that. The percentiles
that all sites need stay exact, for clipping changes no rank but of values that lie in a clipped end:

    true      |.  .     . : :::||||||        at the other sites, percentile 0.5 of all lies somewhere
    clipped   |           :.:::||||||        as long as that is not here  ^^^^^^^^ nothing is different

Every site sees in the bins that are asked for whether one lies in an end of its own. Where that is so (sites whose
intensities hardly overlap), it clips a tenth of that, and so on, and sends that histogram again before it answers. If
other bins follow from it, they are asked for in turn. So the outermost values are told only where they are what the
federation computes, and no more of them than that takes.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunetv2.federated import statistics
from nnunetv2.federated.errors import StatisticsError

HIDDEN_SHARE = 10_000
"""One value of so many is counted further inside, at either end."""
LEAST_HIDDEN = 10
"""Of few values, at least so many, if that leaves the percentiles of the site itself what they are."""
PERCENTILE_SHARE = 400
"""One value of so many is half of what lies beyond the outer percentiles: no more is hidden."""
FEWER = 10
"""By how much less is hidden, step by step, where a wanted bin lies among the hidden values."""


def hidden_of(count: int) -> int:
    """Return how many values at each end of `count` are to be hidden; none of a very few."""
    return min(max(LEAST_HIDDEN, count // HIDDEN_SHARE), count // PERCENTILE_SHARE)


@dataclass(frozen=True)
class Channel:
    """The values of one channel at one site, and how many of the outermost are hidden.

    Args:
        values: float32, in any order.
        counts: int64, how often each occurs.
        lowest: How many values at the lower end are hidden.
        highest: How many at the upper end.
    """

    values: np.ndarray
    counts: np.ndarray
    lowest: int = 0
    highest: int = 0

    @classmethod
    def hiding(cls, values: np.ndarray, counts: np.ndarray) -> Channel:
        """Return a channel whose outermost values are hidden."""
        hidden = hidden_of(int(counts.sum()))
        return cls(values, counts, hidden, hidden)

    def clipped(self) -> np.ndarray:
        """Return the values, those that are hidden replaced by the last one that is not."""
        if not self.lowest and not self.highest:
            return self.values
        return np.clip(self.values, *self._ends())

    def coarse_histogram(self) -> np.ndarray:
        """Count the clipped values; see `statistics.coarse_histogram`."""
        return statistics.coarse_histogram(self.clipped(), self.counts)

    def fine_histogram(self, bins: Sequence[int]) -> np.ndarray:
        """Count the clipped values inside some bins; see `statistics.fine_histogram`."""
        return statistics.fine_histogram(self.clipped(), bins, self.counts)

    def without_hiding(self, bins: Sequence[int]) -> Channel:
        """Return the channel with so few values hidden that none of them lies in, or around, a wanted bin."""
        channel = self
        while channel.lowest and channel._hides_at_lower_end(bins):
            channel = replace(channel, lowest=channel.lowest // FEWER)
        while channel.highest and channel._hides_at_upper_end(bins):
            channel = replace(channel, highest=channel.highest // FEWER)
        return channel

    def _hides_at_lower_end(self, bins: Sequence[int]) -> bool:
        first, end = self.values.min(), self._ends()[0]
        return bool(first < end) and any(_bin_of(first) <= wanted <= _bin_of(end) for wanted in bins)

    def _hides_at_upper_end(self, bins: Sequence[int]) -> bool:
        last, end = self.values.max(), self._ends()[1]
        return bool(end < last) and any(_bin_of(end) <= wanted <= _bin_of(last) for wanted in bins)

    def _ends(self) -> tuple[np.float32, np.float32]:
        """Return the smallest and the largest value that are not hidden."""
        total = int(self.counts.sum())
        low, high = statistics.values_at(self.values, self.counts, (self.lowest, total - 1 - self.highest))
        return low, high


def check_wanted_bins(bins: Sequence[int], coarse: np.ndarray, others: int) -> None:
    """Raise StatisticsError if bins are asked for that hold no wanted rank, whatever the other sites have.

    Args:
        bins: What the coordinator wants to look into.
        coarse: All values of this site, none hidden.
        others: How many values the other sites may have together.
    """
    cumulative = np.cumsum(coarse)
    own = int(cumulative[-1])
    if own == 0:
        return  # there is nothing to look into
    # The more the others have, the more ranks a bin can hold.
    ranks = statistics.wanted_ranks(own + others)
    for wanted in bins:
        upto = int(cumulative[wanted])
        below = upto - int(coarse[wanted])
        if not any(below <= rank < upto + others for rank in ranks):
            raise StatisticsError(f"the coordinator wants to look into bin {wanted} of the intensities, where none of "
                                  "the percentiles of all sites can lie: nothing was sent. Ask the coordinating site "
                                  "which version it runs")


def _bin_of(value: np.float32) -> int:
    return int(statistics.order_keys(np.array([value], np.float32))[0] >> np.uint32(16))
