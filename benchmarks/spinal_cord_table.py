"""Put the two studies of the spinal cord into one table: six hospitals, each tested by those that never saw its scans.

    python -m benchmarks.spinal_cord_table [FOLDER] --reference alone

FOLDER holds spinalcord-1.json and spinalcord-2.json, results of `nnUNetv2_fed_compare` (default: `study_results/`).

Four hospitals have one scan, so nobody can train on it and test at home. Each of them is left out of one study, whose
models are tested there; the other two hospitals have a second scan for tests. At home is the mean of the latter two;
elsewhere is one value per hospital, the mean over all models of other hospitals, both studies and all seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import CORD_SITES, KNOWN
from nnunetv2.comparison.scores import CaseValues, Place, Score, place_of, value_of
from nnunetv2.comparison.significance import compare_arms
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

STUDIES = ("spinalcord-1", "spinalcord-2")
PLACES: Mapping[str, tuple[Place, ...]] = {
    "at home": ("own",),
    "at other hospitals": ("other", "external"),
    "at hospitals that nobody trained on": ("external",),
}
Values = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Arm -> hospital -> seed -> mean over models and studies."""


def scores_of(content: Mapping[str, Any]) -> list[Score]:
    """Return the scores of a result.json; null, where a metric is not defined, is NaN."""
    return [
        Score(**{**one, "values": {name: math.nan if v is None else v for name, v in one["values"].items()}})
        for one in content["scores"]
    ]


def place_values(contents: Sequence[Mapping[str, Any]], metric: str, places: Sequence[Place]) -> Values:
    """Return a metric at the scans of some places.

    Trainings that only one study has are left out.
    """
    several = [scores_of(content) for content in contents]
    in_all = set.intersection(*({(one.arm, one.seed) for one in scores} for scores in several))
    found: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for content, scores in zip(contents, several):
        sites = {convert_dataset_name_to_id(one["name"]): one["name"] for one in content["study"]["sites"]}
        for score in scores:
            if set(place_of(score, sites)) & set(places) and (score.arm, score.seed) in in_all:
                hospital = score.case.split("_")[1]
                found[score.arm][hospital][score.seed].append(value_of(score, metric))
    return {
        arm: {
            hospital: {seed: _mean(several) for seed, several in sorted(seeds.items())}
            for hospital, seeds in sorted(hospitals.items(), key=lambda item: CORD_SITES.index(item[0]))
        }
        for arm, hospitals in found.items()
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.nanmean(values)) if any(not math.isnan(one) for one in values) else math.nan


def table(values: Values, digits: int) -> Iterator[str]:
    """Yield the lines of a table: an arm a line, with the hospitals, their mean, and each seed."""
    hospitals = list(next(iter(values.values())))
    yield f"| arm | {' | '.join(hospitals)} | mean | each seed |"
    yield "|---" * (len(hospitals) + 3) + "|"
    for arm, found in values.items():
        means = [_mean(list(found[hospital].values())) for hospital in hospitals]
        seeds = [_mean([found[hospital][seed] for hospital in hospitals]) for seed in found[hospitals[0]]]
        cells = [f"{one:.{digits}f}" for one in (*means, _mean(means))]
        yield f"| {' | '.join([arm, *cells])} | {', '.join(f'{one:.{digits}f}' for one in seeds)} |"


def differences(values: Values, reference: str) -> Iterator[str]:
    """Yield the lines of a table: every arm against one of them, a hospital as a case."""
    seeds = sorted({seed for found in values.values() for several in found.values() for seed in several})
    per_seed: list[CaseValues] = [
        {
            arm: {0: {name: several[seed] for name, several in found.items() if seed in several}}
            for arm, found in values.items()
        }
        for seed in seeds
    ]
    means: CaseValues = {
        arm: {0: {name: _mean(list(several.values())) for name, several in found.items()}}
        for arm, found in values.items()
    }
    yield "| arm | difference (95 % interval) | in each seed | hospitals above | p | p (Holm) |"
    yield "|---" * 6 + "|"
    for one in compare_arms(means, [reference], per_seed):
        above = sum(means[one.arm][0][name] > means[reference][0][name] for name in means[reference][0])
        cells = (
            one.arm,
            f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f})",
            ", ".join(f"{seed:+.3f}" for seed in one.per_seed),
            f"{above} of {one.num_cases}",
            "too few" if math.isnan(one.p) else f"{one.p:.3f}",
            "too few" if math.isnan(one.p_holm) else f"{one.p_holm:.3f}",
        )
        yield f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=KNOWN)
    parser.add_argument("--reference", default="alone", help="arm that the others are compared with")
    parser.add_argument("--arms", nargs="+", help="arms of the tables (default: all); each comparison costs power")
    arguments = parser.parse_args(argv)
    contents = [json.loads((arguments.folder / f"{name}.json").read_text(encoding="utf-8")) for name in STUDIES]
    for metric, digits in (("Dice", 3), ("HD95", 2)):
        for title, places in PLACES.items():
            values = place_values(contents, metric, places)
            values = {arm: values[arm] for arm in arguments.arms or values}
            print(f"\n{metric} {title}:\n", *table(values, digits), sep="\n")
            if metric == "Dice" and "other" in places and len(values) > 1:
                print(f"\nAgainst {arguments.reference}:\n", *differences(values, arguments.reference), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
