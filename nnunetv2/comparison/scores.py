"""Read the scores of all models, and reduce them to one value per case."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nnunetv2.evaluation.summary import load_summary_json
from nnunetv2.utilities.file_endings import strip_ending

METRICS = ("Dice", "HD95", "SurfaceDice")
LOWER_IS_BETTER = frozenset({"HD95"})
Place = Literal["own", "other", "external"]
PLACES: Mapping[Place, str] = {
    "own": "at its own site",
    "other": "at the other sites",
    "external": "at hospitals that nobody trained on",
}
"""Where a site's model is tested."""
POOLED = "pooled"
"""Name of the one model that was trained in one place."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The scores of one model for one class of one test case."""

    arm: str
    seed: int
    model: str
    """The site whose model it is, or `POOLED`."""
    dataset: int
    """Number of the dataset that the case is of."""
    case: str
    """Name of the case among those of all datasets."""
    which: str
    """The class."""
    values: Mapping[str, float]
    """Metric -> value; NaN where the metric is not defined."""


def read_scores(file: Path, *, ending: str, arm: str, seed: int, model: str) -> list[Score]:
    """Read the summary.json of a model's predictions, files with this ending."""
    scores = []
    for case in load_summary_json(file)["metric_per_case"]:
        name = strip_ending(Path(case["prediction_file"]).name, ending)
        for which, values in case["metrics"].items():
            scores.append(
                Score(
                    arm=arm,
                    seed=seed,
                    model=model,
                    dataset=int(name.split("_")[0]),
                    case=name,
                    which=str(which),
                    values={metric: float(values.get(metric, math.nan)) for metric in METRICS},
                )
            )
    return scores


def place_of(score: Score, sites: Mapping[int, str]) -> tuple[Place, ...]:
    """Return the places that a score belongs to.

    A pooled model has no site, so every site is its own and another one.

    Args:
        sites: Number of the dataset -> name of the site.
    """
    if score.dataset not in sites:
        return ("external",)
    if score.model == POOLED:
        return ("own", "other")
    return ("own",) if sites[score.dataset] == score.model else ("other",)


def value_of(score: Score, metric: str) -> float:
    """Return a metric of a score for a comparison: NaN where it is not defined.

    The evaluation defines no Dice where neither reference nor prediction have a class. Here it is 1, and so is the
    surface Dice, since predicting nothing is right there; with a gap, only the models that are wrong there (0) would
    have a value, and no pair of models could be compared.
    """
    if metric not in LOWER_IS_BETTER and math.isnan(score.values["Dice"]):
        return 1.0
    return score.values[metric]


CaseValues = dict[str, dict[int, dict[str, float]]]
"""Arm -> number of the dataset -> case -> value."""


def values_per_case(scores: Iterable[Score], sites: Mapping[int, str], place: Place, metric: str) -> CaseValues:
    """Return one value per arm and case.

    It is the mean over classes, then over models, then over seeds.

    Where a metric is not defined it is left out of the mean; a case without any defined value is left out.
    """
    per_class: dict[tuple[str, int, str, int, str], list[float]] = defaultdict(list)
    for score in scores:
        if place in place_of(score, sites):
            per_class[score.arm, score.dataset, score.case, score.seed, score.model].append(value_of(score, metric))
    per_model: dict[tuple[str, int, str, int], list[float]] = defaultdict(list)
    for (arm, dataset, case, seed, _), values in per_class.items():
        per_model[arm, dataset, case, seed].append(_mean(values))
    per_seed: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for (arm, dataset, case, _), values in per_model.items():
        per_seed[arm, dataset, case].append(_mean(values))
    result: CaseValues = {}
    for (arm, dataset, case), values in sorted(per_seed.items()):
        if not math.isnan(mean := _mean(values)):
            result.setdefault(arm, {}).setdefault(dataset, {})[case] = mean
    return result


def count_undefined(scores: Iterable[Score], sites: Mapping[int, str], place: Place, metric: str) -> dict[str, int]:
    """Count each arm's values of a metric that are not defined.

    Cases without the class, in which nothing is predicted, do not count.
    """
    counts: dict[str, int] = defaultdict(int)
    for score in scores:
        if place in place_of(score, sites):
            is_missing = math.isnan(score.values[metric]) and not math.isnan(score.values["Dice"])
            counts[score.arm] += is_missing
    return dict(counts)


def means_per_seed(
    scores: Sequence[Score], sites: Mapping[int, str], place: Place, metric: str
) -> dict[str, dict[int, float]]:
    """Return the mean of all datasets for every arm and seed."""
    result: dict[str, dict[int, float]] = {}
    for seed in sorted({score.seed for score in scores}):
        values = values_per_case((one for one in scores if one.seed == seed), sites, place, metric)
        for arm, datasets in values.items():
            result.setdefault(arm, {})[seed] = _mean([_mean(list(cases.values())) for cases in datasets.values()])
    return result


def matrix(scores: Iterable[Score], arm: str, metric: str) -> dict[str, dict[int, float]]:
    """Return the mean of every model of an arm on every dataset.

    Model -> number of the dataset -> value.
    """
    cells: dict[tuple[str, int], dict[tuple[int, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in scores:
        if score.arm == arm:
            cells[score.model, score.dataset][score.seed, score.case].append(value_of(score, metric))
    result: dict[str, dict[int, float]] = {}
    for (model, dataset), cases in sorted(cells.items()):
        result.setdefault(model, {})[dataset] = _mean([_mean(values) for values in cases.values()])
    return result


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are defined, NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
