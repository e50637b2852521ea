"""Choose the training and validation cases of a fold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nnunetv2.experiment_planning.patient_splits import split_patients
from nnunetv2.preprocessed_data.bad_cases import describe_bad_cases, load_bad_cases
from nnunetv2.preprocessed_data.patients_file import PATIENTS_FILE, find_separated, load_patients
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.crossval_split import generate_crossval_split, read_splits

Report = Callable[..., None]
Split = tuple[list[str], list[str]]

SPLITS_FILE = "splits_final.json"
SEED = 12345


def split_cases(
    path: Path,
    fold: int,
    identifiers: Callable[[], Iterable[str]],
    folder: str,
    report: Report,
    *,
    generate: Callable[..., list[dict]] = generate_crossval_split,
) -> Split:
    """Return the training and validation cases of a fold.

    Splits are written for a dataset that has none.

    Args:
        path: The file splits_final.json.
        identifiers: Gives all preprocessed cases. If it raises NotImplementedError, the cases of the file are taken
            to be there.
        folder: Where they are, for messages.
        report: Takes lines for the training log.
        generate: Splits sorted cases, as `generate_crossval_split` does.

    Raises:
        FileNotFoundError: Cases of the fold are not preprocessed.
        ValueError: The fold is negative, the file makes no sense, one of the two lists is empty, a patient is on both
            sides, or there are too few cases to split.
    """
    folds = load_or_create_splits(path, identifiers, report, generate=generate)
    train, val = choose_fold(folds, fold, identifiers, report)
    _require_cases(train, val, f"fold {fold} of {path}")
    _require_whole_patients((train, val), fold, path)
    train, val = _without_bad_cases((train, val), fold, path, report)
    try:
        available = identifiers()
    except NotImplementedError:  # a dataset class of a user need not list its cases
        return train, val
    require_preprocessed([*train, *val], available, folder)
    return train, val


def report_bad_cases(preprocessed_folder: Path, report: Report) -> None:
    """Note in the training log which cases the dataset does without, if any."""
    line = describe_bad_cases(preprocessed_folder)
    if line is not None:
        report(line)


def load_or_create_splits(
    path: Path,
    identifiers: Callable[[], Iterable[str]],
    report: Report,
    *,
    generate: Callable[..., list[dict]] = generate_crossval_split,
) -> list[dict]:
    """Read the splits of a dataset, or write a five-fold cross-validation.

    Patients with several cases are kept whole, where patients.json names them.

    Args:
        path: The file splits_final.json.
        identifiers: Gives all preprocessed cases; called only if the file is missing.
        report: Takes lines for the training log.
        generate: Splits sorted cases, as `generate_crossval_split` does.

    Raises:
        ValueError: There are fewer than five cases or patients to split, or the file is not a list of train and val
            lists.
    """
    if path.is_file():
        splits = read_splits(path)
        report(f"Splits: {len(splits)}, read from {path}")
        return splits
    cases, known = sorted(identifiers()), load_patients(path.parent)
    patients = {case: known.get(case, case) for case in cases}
    if len(set(patients.values())) < len(cases):
        report(f"Splits: five folds that keep patients whole ({path.parent / PATIENTS_FILE}), written to {path}")
        splits = split_patients(patients, 5, seed=SEED)
    else:
        report(f"Splits: five folds, written to {path}")
        splits = generate(cases, seed=SEED, n_splits=5)
    splits = [{part: [str(key) for key in keys] for part, keys in split.items()} for split in splits]
    save_json_atomically(splits, path)
    return splits


def choose_fold(splits: Sequence[dict], fold: int, identifiers: Callable[[], Iterable[str]], report: Report) -> Split:
    """Return the training and validation cases of a fold.

    A fold beyond the splits is a random 80:20 split.

    Raises:
        ValueError: The fold is negative.
    """
    if fold < 0:
        raise ValueError(f"fold {fold}: folds are counted from 0 (or 'all')")
    report(f"Wanted fold: {fold}")
    if fold < len(splits):
        train, val = list(splits[fold]["train"]), list(splits[fold]["val"])
    else:
        report(
            f"INFO: fold {fold} is not among the {len(splits)} splits of the dataset: splitting its cases 80:20 at "
            f"random, with seed {SEED + fold}. Such folds overlap with each other."
        )
        train, val = split_randomly(identifiers(), fold)
    report(f"Cases: {len(train)} for training, {len(val)} for validation")
    both = sorted(set(train) & set(val))
    if both:
        report(
            f"WARNING: {len(both)} cases are in both the training and the validation set: {', '.join(both)}. "
            "Validation scores will be too good."
        )
    return train, val


def _without_bad_cases(split: Split, fold: int, path: Path, report: Report) -> Split:
    """Leave out the cases that preprocessing left out.

    So splits made for all cases still serve.
    """
    bad = {one.case for one in load_bad_cases(path.parent)}
    found = sorted(bad.intersection([*split[0], *split[1]]))
    if not found:
        return split
    report(f"Fold {fold} of {path} names {len(found)} bad cases, which are left out: {', '.join(found)}")
    train, val = ([case for case in part if case not in bad] for part in split)
    _require_cases(train, val, f"without bad cases, fold {fold} of {path}")
    return train, val


def _require_cases(train: Sequence[str], val: Sequence[str], fold: str) -> None:
    empty = [what for what, cases in (("training", train), ("validation", val)) if not cases]
    if empty:
        raise ValueError(
            f"{fold} has no {' and no '.join(empty)} cases. Name some there, or train on all cases with fold 'all'"
        )


def _require_whole_patients(split: Split, fold: int, path: Path) -> None:
    """Check that no patient is on both sides, where patients.json says who is who."""
    separated = find_separated([dict(zip(("train", "val"), split))], load_patients(path.parent))
    if separated:
        of_all = f" and {len(separated) - 1} more patients" if len(separated) > 1 else ""
        raise ValueError(
            f"{path}: {replace(separated[0], fold=fold)}{of_all}. Write the splits anew with nnUNetv2_make_splits "
            f"--overwrite, or correct {path.parent / PATIENTS_FILE} if these are not the same patient"
        )


def split_randomly(identifiers: Iterable[str], fold: int) -> Split:
    """Draw 80 % of the cases for training, in the order drawn.

    The rest is for validation.
    """
    keys = sorted(identifiers)
    drawn = np.random.RandomState(SEED + fold).choice(len(keys), int(len(keys) * 0.8), replace=False)
    chosen = set(drawn.tolist())
    return [keys[i] for i in drawn], [key for i, key in enumerate(keys) if i not in chosen]


def require_preprocessed(keys: Iterable[str], available: Iterable[str], folder: str) -> None:
    """Check that all cases of a split are there.

    Raises:
        FileNotFoundError: Some are not preprocessed; the message names them.
    """
    missing = sorted(set(keys) - set(available))
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise FileNotFoundError(
            f"{len(missing)} cases of {SPLITS_FILE} are not in {folder}: {shown}. Preprocess them, "
            "or remove them from the splits"
        )
