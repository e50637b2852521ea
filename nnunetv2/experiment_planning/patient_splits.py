"""Split cases into folds that keep patients whole and spread groups, or leave one out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Folds = list[dict[str, list[str]]]
"""One dict `{"train": [...], "val": [...]}` per fold; each case is validated once."""

SEED = 12345


def split_patients(
    patients: Mapping[str, str], num_folds: int, groups: Mapping[str, str] | None = None, *, seed: int = SEED
) -> Folds:
    """Split into folds of about equal size, in which every group has its share.

    Patients are dealt one by one, those with most cases first, each to the fold that has the fewest cases of its
    group. A patient with cases in several groups counts as one of a group of its own kind.

    Args:
        patients: Case -> patient.
        groups: Case -> group, for every case; None: all are alike.

    Raises:
        ValueError: There are fewer than two folds, or fewer patients than folds.
    """
    cases_of = invert(patients)
    if num_folds < 2 or len(cases_of) < num_folds:
        raise ValueError(
            f"cannot split {len(cases_of)} patients into {num_folds} folds: it takes two folds, and a patient for each"
        )
    groups = groups or dict.fromkeys(patients, "")
    strata: dict[tuple[str, ...], list[str]] = {}
    for patient, cases in cases_of.items():
        strata.setdefault(tuple(sorted({groups[case] for case in cases})), []).append(patient)
    drawn = np.random.RandomState(seed)
    total, validated = [0] * num_folds, [set[str]() for _ in range(num_folds)]
    for _, members in sorted(strata.items()):
        in_random_order = [members[i] for i in drawn.permutation(len(members))]
        of_group = [0] * num_folds
        for patient in sorted(in_random_order, key=lambda name: -len(cases_of[name])):
            fold = min(range(num_folds), key=lambda f: (of_group[f], total[f], f))
            of_group[fold] += len(cases_of[patient])
            total[fold] += len(cases_of[patient])
            validated[fold].update(cases_of[patient])
    return [_fold(patients, validation) for validation in validated]


def leave_one_group_out(patients: Mapping[str, str], groups: Mapping[str, str]) -> Folds:
    """Make a fold per group that validates on this group and trains on the others.

    Folds are in the order of the groups' names.

    Args:
        patients: Case -> patient.
        groups: Case -> group, for every case.

    Raises:
        ValueError: There is one group only, or a patient has cases in several, who would be on both sides.
    """
    cases_of = invert(groups)
    if len(cases_of) < 2:
        raise ValueError(f"all cases are of one group, {next(iter(cases_of), 'none')}: there is none to leave out")
    for patient, cases in invert(patients).items():
        found = sorted({groups[case] for case in cases})
        if len(found) > 1:
            raise ValueError(
                f"patient {patient} has cases in the groups {', '.join(found)} and would be on both sides: give all "
                f"of {', '.join(cases)} one group, or leave out --leave_one_group_out"
            )
    return [_fold(patients, set(cases)) for _, cases in sorted(cases_of.items())]


def invert(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return name -> its cases, both in sorted order, of case -> name."""
    cases_of: dict[str, list[str]] = {}
    for case in sorted(names):
        cases_of.setdefault(names[case], []).append(case)
    return dict(sorted(cases_of.items()))


def describe_folds(folds: Folds, patients: Mapping[str, str], groups: Mapping[str, str] | None) -> list[str]:
    """Return a line per fold: patients and cases on both sides, and groups validated on."""
    lines = []
    for number, fold in enumerate(folds):
        sides = (
            f"{_count(len({patients[case] for case in fold[part]}), 'patient')} ({_count(len(fold[part]), 'case')})"
            for part in ("train", "val")
        )
        line = "fold {}: train on {}, validate on {}".format(number, *sides)
        if groups:
            of_group = invert({case: groups[case] for case in fold["val"]})
            line += ": " + ", ".join(f"{group} {len(cases)}" for group, cases in of_group.items())
        lines.append(line)
    return lines


def _fold(cases: Sequence[str] | Mapping[str, str], validation: set[str]) -> dict[str, list[str]]:
    ordered = sorted(cases)
    return {
        "train": [case for case in ordered if case not in validation],
        "val": [case for case in ordered if case in validation],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
