"""Build summary.json: scores, their means, and the spelling of classes as keys."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from nnunetv2.evaluation.confusion import Confusion
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.json_files import read_json

logger = logging.getLogger(__name__)

LabelOrRegion = int | Sequence[int]
Results = dict[str, Any]


def label_or_region_to_key(label_or_region: LabelOrRegion) -> str:
    """Return a class as summary.json spells it: "1", or "(1, 2, 3)"."""
    return str(plain_class(label_or_region))


def key_to_label_or_region(key: str) -> LabelOrRegion:
    """Parse the key of a class in summary.json: int, or tuple of ints."""
    try:
        return int(key)
    except ValueError:
        return tuple(int(part) for part in key.strip("() ").split(",") if part.strip())


def plain_class(label_or_region: LabelOrRegion | str) -> Any:
    """Return a label as int and a region as tuple of ints.

    Their NumPy kin print differently.
    """
    if isinstance(label_or_region, str):
        return label_or_region
    plain: Any = label_or_region
    return int(plain) if np.ndim(plain) == 0 else tuple(map(int, plain))


def labels_of(label_or_region: LabelOrRegion) -> tuple[int, ...]:
    """Return the labels that make up a class."""
    labels: Any = label_or_region
    return (labels,) if np.ndim(labels) == 0 else tuple(labels)


def counted_labels(classes: Iterable[LabelOrRegion], ignore_label: int | None = None) -> set[int]:
    """Return all labels on which the scores of these classes depend."""
    ignored = () if ignore_label is None else (ignore_label,)
    return {label for which in classes for label in labels_of(which)}.union(ignored)


def labels_to_list_of_regions(labels: Iterable[int]) -> list[tuple[int, ...]]:
    """Return each label as a region of its own: [1, 2] becomes [(1,), (2,)]."""
    return [(label,) for label in labels]


def score_classes(
    confusion: Confusion, classes: Sequence[LabelOrRegion], ignore_label: int | None = None
) -> dict[LabelOrRegion, dict[str, float]]:
    """Return overlaps and counts of voxels per class.

    Voxels whose reference is `ignore_label` do not count.
    """
    if ignore_label is not None:
        confusion = confusion.without_reference(ignore_label)
    return {plain_class(which): _scores(*confusion.of_class(labels_of(which))) for which in classes}


def summarize(metrics_of_cases: Sequence[Mapping[LabelOrRegion, Mapping[str, float]]], *, warn: bool = True) -> Results:
    """Return the means over cases (`mean`, per class) and over foreground classes (`foreground_mean`).

    Where a score is not defined (NaN) it is left out of its mean; a class that is in no case at all is left out of the
    foreground mean, with a warning unless `warn` is False.
    """
    first = metrics_of_cases[0]
    mean = {
        which: {name: _nanmean([metrics[which][name] for metrics in metrics_of_cases]) for name in scores}
        for which, scores in first.items()
    }
    foreground = [which for which in mean if which not in (0, "0")]
    undefined = [label_or_region_to_key(which) for which in foreground if np.isnan(mean[which]["Dice"])]
    if undefined and warn:
        logger.warning(
            "class %s is in no reference and no prediction: the foreground mean is over the other classes",
            ", ".join(undefined),
        )
    names = next(iter(first.values())) if first else ()
    return {
        "mean": mean,
        "foreground_mean": {name: _nanmean([mean[which][name] for which in foreground]) for name in names},
    }


def save_summary_json(results: Results, output_file: str | os.PathLike[str]) -> None:
    """Write results, keys sorted.

    Undefined numbers are written as NaN. `results` stays unchanged.
    """
    plain = _change_keys(deepcopy(results), label_or_region_to_key)
    recursive_fix_for_json_export(plain)
    save_json_atomically(plain, output_file)


def load_summary_json(filename: str | os.PathLike[str]) -> Results:
    """Read results as they were before `save_summary_json`: classes are ints and tuples again."""
    return _change_keys(read_json(filename), key_to_label_or_region)


def _change_keys(results: Results, change: Callable) -> Results:
    results["mean"] = {change(which): scores for which, scores in results["mean"].items()}
    for case in results["metric_per_case"]:
        case["metrics"] = {change(which): scores for which, scores in case["metrics"].items()}
    return results


def _scores(tp: int, fp: int, fn: int, tn: int) -> dict[str, float]:
    found_or_wanted = tp + fp + fn
    return {
        "Dice": 2 * tp / (2 * tp + fp + fn) if found_or_wanted else np.nan,
        "IoU": tp / found_or_wanted if found_or_wanted else np.nan,
        "FP": fp,
        "TP": tp,
        "FN": fn,
        "TN": tn,
        "n_pred": fp + tp,
        "n_ref": fn + tp,
    }


def _nanmean(values: Sequence[float]) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(np.nanmean(array)) if not np.isnan(array).all() else float("nan")
