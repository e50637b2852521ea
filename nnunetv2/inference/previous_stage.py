"""Predict the previous stage of a cascade, where the user has not done it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nnunetv2.inference.errors import FailedCasesError, NoPreviousStageError
from nnunetv2.utilities.file_path_utilities import (
    convert_identifier_to_trainer_plans_config,
    convert_trainer_plans_config_to_identifier,
)


def previous_stage_model(model_folder: Path, previous_stage: str, folds: list[int | str], checkpoint: str) -> Path:
    """Return the folder of a cascade's previous model.

    It is beside the cascade's, with the same trainer, plans and folds.

    Raises:
        FileNotFoundError: It is not there, or a fold is missing; the message has a remedy.
    """
    remedy = (
        f"predict {previous_stage} yourself and pass the folder of its label maps with -prev_stage_predictions "
        f"(nnUNetv2_predict ... -c {previous_stage} -o STAGE_1, then this command with -prev_stage_predictions "
        "STAGE_1)"
    )
    parts = convert_identifier_to_trainer_plans_config(model_folder.resolve().name)
    if len(parts) != 3:
        raise FileNotFoundError(
            f"this model continues {previous_stage}, and the name of its folder, {model_folder}, "
            f"does not tell where that is: {remedy}"
        )
    identifier = convert_trainer_plans_config_to_identifier(*parts[:2], previous_stage)
    folder = model_folder.resolve().parent / identifier
    missing = [path for path in (folder / f"fold_{fold}" / checkpoint for fold in folds) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"this model continues {previous_stage}, which cannot be predicted first, for there is "
            f"no {', '.join(map(str, missing))}: {remedy}"
        )
    return folder


def previous_stage_output(output_folder: Path, previous_stage: str) -> Path:
    """Return the folder for predictions of the previous stage.

    They stay, so that a run can be continued.
    """
    return output_folder / f"predicted_{previous_stage}"


def run_both_stages(
    first: Callable[[], None], second: Callable[[], None], *, name_of_first: str, file_ending: str
) -> None:
    """Run the two stages of a cascade.

    Cases that fail in the first do not keep the others from the second.

    Args:
        first, second: Predict all cases, and raise a FailedCasesError at the end if some failed.
        name_of_first: How messages call the first stage.
        file_ending: That of label maps.

    Raises:
        FailedCasesError: Cases failed in one of the stages; the message lists them all.
    """
    failures: list[tuple[str, BaseException]] = []
    stopped: set[str] = set()
    total = 0
    try:
        first()
    except FailedCasesError as error:
        for output, reason in error.failures:
            Path(f"{output}{file_ending}").unlink(missing_ok=True)  # of an earlier run, which nothing may go on from
            failures.append((f"{output} ({name_of_first})", reason))
            stopped.add(Path(output).name)
        total = error.total
    try:
        second()
    except FailedCasesError as error:
        failures += [failure for failure in error.failures if Path(failure[0]).name not in stopped]
        total = max(total, error.total)
    except NoPreviousStageError:
        if not stopped:
            raise  # else not one case has come through the first stage
    if failures:
        raise FailedCasesError(failures, total) from failures[0][1]
