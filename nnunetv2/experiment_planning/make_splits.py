"""The command nnUNetv2_make_splits: splits that keep patients whole, written or checked."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.command_line import dataset_argument, run_command

DEFAULT_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class SplitRequest:
    """The rules by which a dataset is split."""

    patients: str | None = None
    """Regular expression or table; None: as patients.json says, or else every case is a patient of its own."""
    groups: Path | None = None
    """Table of the hospital, scanner or the like of each case or patient."""
    num_folds: int = DEFAULT_FOLDS
    leave_one_group_out: bool = False
    seed: int = 12345
    overwrite: bool = False


def make_splits_entry() -> None:
    run_command(main)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.leave_one_group_out and arguments.group is None:
        parser.error("--leave_one_group_out needs --group, the table of groups")
    if arguments.leave_one_group_out and arguments.folds is not None:
        parser.error("--leave_one_group_out makes a fold per group: leave out --folds")
    request = SplitRequest(
        patients=arguments.patients,
        groups=arguments.group,
        num_folds=arguments.folds or DEFAULT_FOLDS,
        leave_one_group_out=arguments.leave_one_group_out,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    (check_splits if arguments.check else make_splits)(arguments.d, request)


def make_splits(dataset: int | str, request: SplitRequest) -> None:
    """Write splits_final.json of a dataset and the patients beside it; print the folds.

    Splits that are there already stay unless `request.overwrite`.

    Raises:
        FileExistsError: There are splits already.
        ValueError: Patients or groups cannot be told, or do not suffice for the folds.
    """
    from nnunetv2.experiment_planning.patient_names import read_table
    from nnunetv2.experiment_planning.patient_splits import describe_folds
    from nnunetv2.preprocessed_data.patients_file import PATIENTS_FILE, save_patients
    from nnunetv2.utilities.atomic_write import save_json_atomically
    from nnunetv2.utilities.plain_text import show

    found = _find_dataset(dataset)
    named = _name_patients(found, request.patients)
    patients = named or dict(zip(found.cases, found.cases))
    groups = (
        None if request.groups is None else read_table(request.groups, found.cases, what="group", patients=patients)
    )
    folds = _split(patients, groups, request, are_cases=not named)
    _require_free(found, folds, patients, overwrite=request.overwrite)
    found.preprocessed.mkdir(parents=True, exist_ok=True)
    # the patients first: a run that is killed in between leaves splits that training refuses, not ones it believes
    if named:
        save_patients({**found.declared_patients, **patients}, found.preprocessed)
    save_json_atomically(folds, found.splits)
    owners = f"{len(set(patients.values()))} patients" + ("" if named else " (each case taken for one)")
    counts = f"{len(found.cases)} cases of {owners} in {len(folds)} folds"
    show(f"{counts}, written to {found.splits}")
    show(*(f"  {line}" for line in describe_folds(folds, patients, groups)))
    if named:
        show(f"Training refuses splits that separate one of these patients ({found.preprocessed / PATIENTS_FILE}).")
    if len(folds) != DEFAULT_FOLDS:
        numbers = " ".join(map(str, range(len(folds))))
        show(f"Train the folds {numbers}, and name them to nnUNetv2_find_best_configuration: -f {numbers}")


def _split(
    patients: Mapping[str, str], groups: Mapping[str, str] | None, request: SplitRequest, *, are_cases: bool
) -> list[dict]:
    from nnunetv2.experiment_planning.patient_splits import leave_one_group_out, split_patients
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    if groups is not None and request.leave_one_group_out:
        return leave_one_group_out(patients, groups)
    if are_cases and groups is None:  # as training does on its own
        folds = generate_crossval_split(sorted(patients), seed=request.seed, n_splits=request.num_folds)
        return [{part: [str(case) for case in cases] for part, cases in fold.items()} for fold in folds]
    return split_patients(patients, request.num_folds, groups, seed=request.seed)


def _require_free(found: _Dataset, folds: list[dict], patients: Mapping[str, str], *, overwrite: bool) -> None:
    """Check that no other splits would be replaced unasked.

    Raises:
        FileExistsError: They would.
    """
    from nnunetv2.preprocessed_data.patients_file import find_separated
    from nnunetv2.utilities.crossval_split import read_splits

    if found.raw_splits is not None and read_splits(found.raw_splits) != folds:
        raise FileExistsError(
            f"{found.raw_splits} comes with the dataset, and planning holds to it: remove it if other splits are wanted"
        )
    if not found.splits.is_file() or overwrite:
        return
    present = read_splits(found.splits)
    if present != folds:
        state = "separates patients" if find_separated(present, patients) else "holds other splits"
        raise FileExistsError(
            f"{found.splits} exists and {state}. --overwrite replaces it; models trained so far keep to the old splits"
        )


def check_splits(dataset: int | str, request: SplitRequest) -> None:
    """Check that the splits in place separate no patient, and print the result.

    Raises:
        FileNotFoundError: There are no splits.
        ValueError: A patient is on both sides of a fold, or nobody has said which case shows whom.
    """
    from nnunetv2.preprocessed_data.patients_file import PATIENTS_FILE, find_separated
    from nnunetv2.utilities.crossval_split import read_splits
    from nnunetv2.utilities.plain_text import show

    found = _find_dataset(dataset)
    patients = _name_patients(found, request.patients)
    if not patients:
        raise ValueError(
            f"--check needs --patients, or the file {found.preprocessed / PATIENTS_FILE}: nobody has said which case "
            "shows whom"
        )
    file = found.splits if found.splits.is_file() else found.raw_splits or found.splits
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file} to check; without --check it is written")
    folds = read_splits(file)
    strangers = sorted({case for fold in folds for part in ("train", "val") for case in fold[part]} - set(found.cases))
    if strangers:
        raise ValueError(
            f"{file} names {len(strangers)} cases that the dataset does not have: {', '.join(strangers[:10])}"
        )
    separated = find_separated(folds, patients)
    show(*map(str, separated))
    if separated:
        raise ValueError(
            f"{file} separates {len({one.patient for one in separated})} patients, so validation scores are too good. "
            "Write it anew with nnUNetv2_make_splits --overwrite"
        )
    show(f"{file}: {len(folds)} folds, {len(set(patients.values()))} patients, none on both sides of a fold.")


@dataclass(frozen=True)
class _Dataset:
    cases: list[str]
    preprocessed: Path
    raw: Path | None
    """None where only preprocessed data lie."""

    @property
    def splits(self) -> Path:
        """The file that training reads."""
        from nnunetv2.experiment_planning.experiment_planners.splits import SPLITS_FILE

        return self.preprocessed / SPLITS_FILE

    @property
    def raw_splits(self) -> Path | None:
        """The file that comes with the raw dataset, if there is one."""
        file = None if self.raw is None else self.raw / self.splits.name
        return file if file is not None and file.is_file() else None

    @property
    def declared_patients(self) -> dict[str, str]:
        """Case -> patient, as the raw dataset says; empty if it does not."""
        from nnunetv2.preprocessed_data.patients_file import load_patients

        return {} if self.raw is None else load_patients(self.raw)


def _find_dataset(name_or_id: int | str) -> _Dataset:
    """Find the training cases of a raw dataset, or else of a preprocessed one."""
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.preprocessed_data.bad_cases import describe_bad_cases, list_training_cases
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.file_endings import list_names, strip_ending
    from nnunetv2.utilities.json_files import read_json
    from nnunetv2.utilities.plain_text import show

    preprocessed_root = Path(nnUNet_preprocessed.require())
    name = maybe_convert_to_dataset_name(name_or_id)
    preprocessed = preprocessed_root / name
    raw = Path(nnUNet_raw) / name if nnUNet_raw.is_set() else None
    if raw is not None and (raw / "dataset.json").is_file():
        cases = sorted(map(str, list_training_cases(raw, preprocessed)))
    else:
        raw, references = None, preprocessed / "gt_segmentations"
        if not references.is_dir():
            raise FileNotFoundError(f"there is neither a raw nor a preprocessed dataset {name}: check nnUNet_raw")
        show(f"There is no raw dataset {name} here: the cases are those of {references}.")
        ending = read_json(preprocessed / "dataset.json")["file_ending"]
        cases = [strip_ending(file, ending) for file in list_names(references, ending)]
    left_out = describe_bad_cases(preprocessed)
    if left_out is not None:
        show(left_out)
    if not cases:
        raise ValueError(f"{name} has no training cases")
    return _Dataset(cases, preprocessed, raw)


def _name_patients(found: _Dataset, rule: str | None) -> dict[str, str]:
    """Return the patient of each case by a rule, or by patients.json; empty where nobody has said.

    A case that the file leaves out is a patient of its own.

    Raises:
        ValueError: The rule and the raw dataset's file name different patients.
    """
    from nnunetv2.experiment_planning.patient_names import assign_patients
    from nnunetv2.preprocessed_data.patients_file import load_patients, require_same_patients

    declared = found.declared_patients
    if rule is None:
        known = {**load_patients(found.preprocessed), **declared}
        return {case: known.get(case, case) for case in found.cases} if known else {}
    patients = assign_patients(found.cases, rule)
    require_same_patients(patients, declared, f"--patients {rule!r}", found.raw)
    return patients


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Write the splits of a dataset so that each patient is on one side of every fold. Do it before the "
        "first training."
    )
    parser.add_argument(
        "-d",
        type=dataset_argument,
        required=True,
        metavar="DATASET",
        help="Number of the dataset, such as 4, or its name.",
    )
    parser.add_argument(
        "--patients",
        metavar="REGEX|CSV",
        help="Which patient a case shows: a regular expression whose first group (or whole match) is the patient's "
        "part of the name, such as '^(P[0-9]+)_', or a table with the columns case and patient. Default: as "
        "patients.json says; without it, each case is a patient of its own.",
    )
    parser.add_argument("--folds", type=_at_least_two, metavar="N", help=f"Number of folds. Default: {DEFAULT_FOLDS}")
    parser.add_argument(
        "--group",
        type=Path,
        metavar="CSV",
        help="Table with the columns case (or patient) and group: hospitals, scanners. Every fold gets its share of "
        "each group.",
    )
    parser.add_argument(
        "--leave_one_group_out",
        action="store_true",
        help="A fold per group instead, which validates on this group and trains on the others.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="Write nothing; fail if the splits that are there have a patient on both sides.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace splits that are there already.")
    parser.add_argument("--seed", type=_seed, default=12345, metavar="N", help="Seed of the order. Default: 12345")
    return parser


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ArgumentTypeError(f"{text!r} is not a number of folds; it must be 2 or more")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise ArgumentTypeError(f"{text!r} is not a seed; it must be a whole number from 0 to 4294967295")
    return int(text)
