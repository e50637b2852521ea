"""Read results of the same comparison from another folder, perhaps another machine's."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from nnunetv2.comparison.arms import Arm
from nnunetv2.comparison.scores import LOWER_IS_BETTER, METRICS, POOLED, Score
from nnunetv2.comparison.study import Study, check_arms
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.plain_text import show

Training = tuple[str, int]
"""Name of the arm, and seed."""
TestCases = Mapping[int, Collection[str]]
"""Number of the dataset -> its test cases, by their names among those of all datasets."""
_MAY_DIFFER = frozenset({"arms", "seeds", "sites", "external", "device"})
_TEXTS, _NUMBERS = ("arm", "model", "case", "which"), ("seed", "dataset")
_ROUNDING = 1e-6
"""How far above 1 a Dice may be."""


@dataclass(frozen=True, kw_only=True)
class KnownResults:
    """Scores and costs of trainings that need not be run again."""

    scores: Mapping[Training, tuple[Score, ...]] = field(default_factory=dict)
    costs: Mapping[Training, Mapping[str, Any]] = field(default_factory=dict)


def read_known(files: Iterable[Path], study: Study, tests: TestCases) -> KnownResults:
    """Read files result.json of the same comparison, in the order of their importance.

    A training is known if all its models have scores of all test cases; a line names the others.

    Raises:
        ValueError: One is of another comparison, or none; the message names the file, and the difference or the field.
    """
    scores: dict[Training, tuple[Score, ...]] = {}
    costs: dict[Training, Mapping[str, Any]] = {}
    for file in files:
        content = read_json(file, required={"study": dict, "scores": list, "costs": dict})
        try:
            _check_same(file, content["study"], study)
            found = _scores_of(content["scores"], tests)
            found = {training: found[training] for training in found if _is_whole(file, training, found, study, tests)}
            found_costs = {(arm, seed): _cost_of(content["costs"], arm, seed) for arm, seed in found}
        except (KeyError, IndexError, TypeError, AttributeError, _FieldError) as error:
            reason = str(error) if isinstance(error, _FieldError) else repr(error)
            raise ValueError(
                f"{file} is not what nnUNetv2_fed_compare writes as result.json ({reason}): copy it again"
            ) from error
        scores = {**found, **scores}
        costs = {**found_costs, **costs}
    return KnownResults(scores=scores, costs=costs)


class _FieldError(ValueError):
    """A field holds a wrong value; the message names it."""

    def __init__(self, place: str, expected: str, value: object) -> None:
        super().__init__(f"{place} must be {expected}, it is {value!r:.80}")


# ---------------------------------------------------------------------------------------------------------- scores
def _scores_of(entries: Sequence[object], tests: TestCases) -> dict[Training, tuple[Score, ...]]:
    found: dict[Training, dict[tuple[str, str, str], Score]] = defaultdict(dict)
    for number, entry in enumerate(entries):
        place = f"scores[{number}]"
        score = _score_of(place, entry, tests)
        what = score.model, score.case, score.which
        if what in found[score.arm, score.seed]:
            raise _FieldError(place, "of a model, case and class that come once", what)
        found[score.arm, score.seed][what] = score
    return {training: tuple(several.values()) for training, several in found.items()}


def _score_of(place: str, entry: object, tests: TestCases) -> Score:
    fields = _fields_of(place, entry, (*_TEXTS, *_NUMBERS, "values"))
    for name in _TEXTS:
        if not isinstance(fields[name], str):
            raise _FieldError(f"{place}.{name}", "a text", fields[name])
    for name in _NUMBERS:
        if type(fields[name]) is not int or fields[name] < 0:
            raise _FieldError(f"{place}.{name}", "a whole number from 0 on", fields[name])
    dataset, case = fields["dataset"], fields["case"]
    if dataset not in tests:
        raise _FieldError(f"{place}.dataset", f"one of {', '.join(map(str, tests))}", dataset)
    if case not in tests[dataset]:
        raise _FieldError(f"{place}.case", f"a test case of dataset {dataset}", case)
    values = _fields_of(f"{place}.values", fields["values"], METRICS)
    return Score(**{**fields, "values": {name: _value_of(f"{place}.values", name, values) for name in METRICS}})


def _fields_of(place: str, value: object, names: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise _FieldError(place, f"in braces, with {', '.join(names)}", value)
    return value


def _value_of(place: str, metric: str, values: Mapping[str, object]) -> float:
    """Return the value of a metric; null, as which one that is not defined is written, is NaN."""
    if values[metric] is None:
        return math.nan
    is_distance = metric in LOWER_IS_BETTER
    largest, range_in_words = (sys.float_info.max, "from 0 on") if is_distance else (1 + _ROUNDING, "from 0 to 1")
    return _number(f"{place}.{metric}", f"a finite number {range_in_words}, or null", values[metric], largest)


def _number(place: str, expected: str, value: object, largest: float = sys.float_info.max) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
        raise _FieldError(place, expected, value)
    return float(value)


def _is_whole(
    file: Path, training: Training, found: Mapping[Training, Sequence[Score]], study: Study, tests: TestCases
) -> bool:
    """Tell whether a training of this comparison has all its scores; say so if it has not."""
    arm = next((one for one in study.arms if one.name == training[0]), None)
    if arm is None or training[1] >= study.seeds:
        return False
    present = {(one.model, one.case, one.which) for one in found[training]}
    cases = [case for several in tests.values() for case in several]
    classes = {which for _, _, which in present}
    missing = sorted(set(product(models_of(arm, study), cases, classes)) - present)
    if missing:
        model, case, which = missing[0]
        show(
            f"{file}: arm {arm.name}, seed {training[1]} lacks {len(missing)} scores, such as that of {model} for "
            f"class {which} of {case}: this training does not count as known"
        )
    return not missing


def models_of(arm: Arm, study: Study) -> list[str]:
    """Name the models that a training of an arm ends with."""
    return [POOLED] if arm.training == "pooled" else [site.name for site in study.sites]


# ----------------------------------------------------------------------------------------------- costs and the study
def _cost_of(costs: Mapping[str, Any], arm: str, seed: int) -> Mapping[str, Any]:
    cost, place = costs[arm][seed], f"costs.{arm}[{seed}]"
    if not isinstance(cost, dict) or not {"seconds"} <= cost.keys() <= {"seconds", "bytes"}:
        raise _FieldError(place, "in braces, with seconds, and bytes in a federation", cost)
    for name, value in cost.items():
        _number(f"{place}.{name}", "a finite number from 0 on", value)
    return cost


def _check_same(file: Path, held: Mapping[str, Any], study: Study) -> None:
    """Raise ValueError unless a file is of this comparison.

    Folders and device may differ.
    """
    now = study.as_json()
    for key in now.keys() - _MAY_DIFFER:
        if held.get(key) != now[key]:
            raise ValueError(f"{file} is of a comparison with {key} {held.get(key)}, this one has {now[key]}")
    for key in ("sites", "external"):
        names, wanted = ([one["name"] for one in several[key]] for several in (held, now))
        if names != wanted:
            raise ValueError(f"{file} is of a comparison with {key} {' '.join(names)}, this one has {' '.join(wanted)}")
    check_arms(file, held["arms"], now["arms"])
