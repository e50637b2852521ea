"""Rank the cases of a dataset by the distance of their labels from predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2.annotation_audit.disagreement import Classes, Disagreement, Figures, Region, compare
from nnunetv2.annotation_audit.doubtful import FEWEST_CASES, Usual, choose_cut, describe_classes, score_case
from nnunetv2.plans.label_manager import LabelManager

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter


@dataclass(frozen=True)
class RankedRegion:
    """A region with its place among all."""

    region: Region
    score: float
    """Of its distance, in spreads above the median of its class in whole cases."""


@dataclass(frozen=True)
class RankedCase:
    """A case with its place among all."""

    case: str
    score: float
    class_name: str | None
    """The class that the score comes from."""
    is_doubtful: bool
    is_seen: bool
    """Whether the network that predicted it may have learned from its label."""
    figures: Mapping[str, Figures]
    """Per class."""
    regions: list[RankedRegion]
    """Farthest apart first."""
    label_file: str
    prediction_file: str
    image_files: Sequence[str]

    @property
    def reason(self) -> str:
        """Return why it stands out, in words.

        That is its first region. A label exactly as predicted has none, and stands out where others are too small.
        """
        if self.regions:
            region = self.regions[0].region
            return f"{region.kind}, {region.description}"
        if self.class_name is None:
            return "nothing labelled or predicted"
        return f"{self.class_name}, {describe_offset(self.figures[self.class_name].offset_mm)}"


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    dataset: str
    model: str
    classes: Classes
    cut: float
    false_alarms: float
    usual: dict[bool, dict[str, Usual]]
    """The usual figures of cases that were seen (True) or not: class -> figures."""
    cases: list[RankedCase]
    """Most doubtful first."""
    failed: dict[str, str]
    """Case -> why it could not be compared."""

    @property
    def doubtful(self) -> list[RankedCase]:
        """Return the doubtful cases, most doubtful first."""
        return [case for case in self.cases if case.is_doubtful]


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case."""

    label: str
    prediction: str
    images: Sequence[str]
    is_seen: bool


def name_classes(labels: LabelManager) -> dict[str, tuple[int, ...]]:
    """Return the classes of a dataset, without background: name -> labels."""
    named = {
        name: (int(value),) if isinstance(value, (int, str)) else tuple(map(int, value))
        for name, value in labels.label_dict.items()
        if name != "ignore"
    }
    return {name: values for name, values in named.items() if set(values) != {0}}


def compare_files(
    label_file: str, prediction_file: str, reader: BaseReaderWriter, classes: Classes, ignore_label: int | None
) -> Disagreement | str:
    """Compare a label map with its prediction; return errors as text."""
    try:
        label, properties = reader.read_seg(label_file)
        prediction, _ = reader.read_seg(prediction_file)
        return compare(
            _whole_numbers(label[0]),
            _whole_numbers(prediction[0]),
            spacing=_spacing(properties["spacing"], label[0].shape),
            classes=classes,
            ignore_label=ignore_label,
        )
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()) or type(error).__name__


def rank(
    compared: Mapping[str, Disagreement | str],
    files: Mapping[str, CaseFiles],
    *,
    dataset: str,
    model: str,
    classes: Classes,
    false_alarms: float,
) -> Audit:
    """Rank the cases of a dataset by doubt.

    Cases that the network has seen agree with it better, so they are compared among themselves, unless one of the two
    groups is too small for that.

    Args:
        compared: Case -> disagreement, or why there is none.
        files: Of each case.
        false_alarms: Share of the cases of a flawless dataset that would be listed.
    """
    known = {case: found for case, found in compared.items() if isinstance(found, Disagreement)}
    groups = {seen: [case for case in known if files[case].is_seen == seen] for seen in (False, True)}
    are_apart = min(map(len, groups.values())) >= FEWEST_CASES
    usual = {
        seen: describe_classes(known[case].figures for case in (groups[seen] if are_apart else known))
        for seen in groups
    }
    cut = choose_cut(len(classes), false_alarms)
    ranked = []
    for case, found in known.items():
        of_group, origin = usual[files[case].is_seen], files[case]
        score, class_name = score_case(found.figures, of_group)
        regions = [
            RankedRegion(region, of_group[region.class_name].score_distance(region.distance_mm))
            for region in found.regions
        ]
        ranked.append(
            RankedCase(
                case=case,
                score=score,
                class_name=class_name,
                is_doubtful=class_name is not None and score > cut,
                is_seen=origin.is_seen,
                figures=found.figures,
                regions=sorted(regions, key=lambda one: -one.score),
                label_file=origin.label,
                prediction_file=origin.prediction,
                image_files=origin.images,
            )
        )
    ranked.sort(key=lambda one: (-one.score, one.case))
    failed = {case: found for case, found in compared.items() if isinstance(found, str)}
    return Audit(dataset, model, classes, cut, false_alarms, usual, ranked, failed)


def describe_offset(offset_mm: float) -> str:
    """Return in words how much too small or too large a label is."""
    return f"the label {abs(offset_mm):.2f} mm too {'small' if offset_mm > 0 else 'large'}"


def _whole_numbers(labels: np.ndarray) -> np.ndarray:
    return np.rint(labels).astype(np.int32)


def _spacing(spacing: Sequence[float], shape: Sequence[int]) -> tuple[float, ...]:
    """Return the spacing in millimetres; one slice of a picture has none across it, and counts as 1."""
    return tuple(1.0 if side == 1 else abs(float(size)) or 1.0 for size, side in zip(spacing, shape))
