"""Read what another folder of the same comparison, perhaps on another machine, has found."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.comparison.scores import Score
from nnunetv2.comparison.study import Study, check_arms
from nnunetv2.utilities.json_files import read_json

Training = tuple[str, int]
"""Name of the arm, and seed."""
_MAY_DIFFER = frozenset({"arms", "seeds", "sites", "external", "device"})


@dataclass(frozen=True, kw_only=True)
class KnownResults:
    """Scores and costs of trainings that need not be run again."""

    scores: Mapping[Training, tuple[Score, ...]] = field(default_factory=dict)
    costs: Mapping[Training, Mapping[str, Any]] = field(default_factory=dict)


def read_known(files: Iterable[Path], study: Study) -> KnownResults:
    """Read files result.json of the same comparison, in the order of their importance.

    Raises:
        ValueError: One is of another comparison, or none; the message names the file and what differs.
    """
    scores: dict[Training, tuple[Score, ...]] = {}
    costs: dict[Training, Mapping[str, Any]] = {}
    for file in files:
        content = read_json(file, required={"study": dict, "scores": list, "costs": dict})
        _check_same(file, content["study"], study)
        try:
            found = _scores_of(content["scores"])
            found_costs = {(arm, seed): content["costs"][arm][seed] for arm, seed in found}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not what nnUNetv2_fed_compare writes as result.json ({error!r}): copy it again"
            ) from error
        scores = {**found, **scores}
        costs = {**found_costs, **costs}
    return KnownResults(scores=scores, costs=costs)


def _scores_of(entries: Iterable[Mapping[str, Any]]) -> dict[Training, tuple[Score, ...]]:
    found: dict[Training, list[Score]] = defaultdict(list)
    for entry in entries:
        values = {name: math.nan if value is None else value for name, value in entry["values"].items()}
        found[entry["arm"], entry["seed"]].append(Score(**{**entry, "values": values}))
    return {training: tuple(several) for training, several in found.items()}


def _check_same(file: Path, held: Mapping[str, Any], study: Study) -> None:
    """Raise ValueError unless a file is of this comparison; where data lie and what computes may differ."""
    now = study.as_json()
    for key in now.keys() - _MAY_DIFFER:
        if held.get(key) != now[key]:
            raise ValueError(f"{file} is of a comparison with {key} {held.get(key)}, this one has {now[key]}")
    for key in ("sites", "external"):
        names, wanted = ([one["name"] for one in several[key]] for several in (held, now))
        if names != wanted:
            raise ValueError(f"{file} is of a comparison with {key} {' '.join(names)}, this one has {' '.join(wanted)}")
    check_arms(file, held["arms"], now["arms"])
