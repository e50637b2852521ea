"""Decide which cases to predict and where their results go."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.inference.errors import NoPreviousStageError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

logger = logging.getLogger(__name__)

PathOrText = str | os.PathLike
Inputs = PathOrText | Sequence[Sequence[PathOrText]]
Outputs = PathOrText | Sequence[PathOrText] | None

NIFTI_ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class CaseLists:
    """Parallel lists, one entry per case."""

    images: list[list[str]]
    """Image files, one per channel."""
    outputs: list[str] | None
    """Where the result goes, see `name_outputs`. None: results are returned."""
    previous_stage: list[str | None]
    """The label map of a cascade's previous stage."""


def is_path(value: object) -> TypeIs[PathOrText]:
    """Tell one path from a list of paths."""
    return isinstance(value, (str, os.PathLike))


def find_cases(
    images: Inputs,
    outputs: Outputs,
    dataset_json: Mapping[str, Any],
    reader: type,
    create_lists: Callable[[str, str], list[list[str]]],
    *,
    previous_stage_folder: PathOrText | None,
    overwrite: bool,
    save_probabilities: bool,
    part_id: int = 0,
    num_parts: int = 1,
) -> CaseLists:
    """Return the cases that are to be predicted.

    Those are this part's share of a folder's or of listed ones, without the finished. See `list_folder` and
    `list_cases` for arguments and errors. A case without a label map of the previous stage is among them, and fails
    when it is its turn.

    Args:
        overwrite: Whether cases whose results are all there are predicted again.

    Raises:
        NoPreviousStageError: No case has a label map of the previous stage.
    """
    ending = dataset_json["file_ending"]
    cases = list_cases(
        list_folder(images, dataset_json, create_lists) if is_path(images) else images,
        outputs,
        ending,
        reader=reader,
        previous_stage_folder=previous_stage_folder,
        part_id=part_id,
        num_parts=num_parts,
    )
    if not overwrite and cases.outputs is not None:
        total = len(cases.images)
        cases = without_finished(cases, ending, reader, save_probabilities)
        logger.info("%d of %d cases are there already", total - len(cases.images), total)
    require_previous_stage(cases)
    return cases


def list_folder(
    folder: PathOrText, dataset_json: Mapping[str, Any], create_lists: Callable[[str, str], list[list[str]]]
) -> list[list[str]]:
    """Return the image files of each case in a folder.

    Args:
        create_lists: (folder, file ending) -> lists of files; files that belong to no case are its to report.

    Raises:
        FileNotFoundError: There is no such folder, or no case in it.
        ValueError: A case has too many files, too few, or a gap among them.
    """
    folder, ending = os.fspath(folder), dataset_json["file_ending"]
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no input folder {folder}")
    cases = create_lists(folder, ending)
    if not cases:
        raise FileNotFoundError(
            f"no case found in {folder}: the model expects files named CASE_0000{ending}, with one "
            f"number per channel ({_describe_channels(dataset_json)})" + _describe_other_endings(folder, ending)
        )
    for files in cases:
        _check_channels(files, cases, dataset_json)
    return cases


def _describe_other_endings(folder: str, ending: str) -> str:
    """Return a remedy for images in another format than the training data."""
    matches = (re.search(r"_[0-9]{4}((?:\.[A-Za-z0-9]+)+)$", file.name) for file in Path(folder).iterdir())
    found = {match[1] for match in matches if match is not None}
    others = sorted(found - {ending})
    if not others:
        return ""
    return (
        f". There are files that end in {', '.join(others)}: convert them to {ending}, or write "
        f'"file_ending": "{others[0]}" into the model\'s dataset.json, if its reader reads that format'
    )


def case_id(file: PathOrText, ending: str) -> str:
    """Return the name of a case from its first file.

    Folder, ending and, if there is one, channel number are left out.
    """
    name = Path(file).name
    name = name[: -len(ending)] if name.endswith(ending) else Path(name).stem
    return re.sub(r"_[0-9]{4}$", "", name)


def name_outputs(output: PathOrText, ending: str, reader: type) -> tuple[str, str]:
    """Return the paths of a case's label map and probabilities, without endings.

    ITK's writer takes `a.nii.gz.nii.gz` and `a.nii.nii.gz` for `a.nii.gz`, so programs pass such names, and the release
    puts probabilities beside it into `a.nii.gz.npz`. The writer of nibabel doubles the ending.

    Args:
        output: As a program gave it, or as `keep_name` returns it.
        ending: That of the model's files.
        reader: The model's class that reads and writes images.
    """
    output = os.fspath(output)
    labels = _drop_nifti_ending(output, ending, reader)
    return labels, labels if _drop_nifti_ending(labels, ending, reader) != labels else output


def keep_name(output: str, ending: str, reader: type) -> str:
    """Return the argument of `name_outputs` that stands for exactly `output`.

    Its ending belongs to the name of a case.
    """
    return output if _drop_nifti_ending(output, ending, reader) == output else f"{output}{ending}"


def _drop_nifti_ending(output: str, ending: str, reader: type) -> str:
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    if ending not in NIFTI_ENDINGS or issubclass(reader, NibabelIO):
        return output
    found = next((one for one in NIFTI_ENDINGS if output.endswith(one)), "")
    return output[: len(output) - len(found)]


def list_cases(
    images: Sequence[Sequence[PathOrText]],
    outputs: Outputs,
    ending: str,
    *,
    reader: type,
    previous_stage_folder: PathOrText | None,
    part_id: int,
    num_parts: int,
) -> CaseLists:
    """Take this part's share of the cases and find their outputs and previous stages.

    Args:
        outputs: A folder, one path per case, or None.
        reader: The model's class that reads and writes images.

    Raises:
        ValueError: The part does not exist, a case has no image, there is no output for each case, or two cases share
            one.
    """
    if not 0 <= part_id < num_parts:
        raise ValueError(f"part_id must be 0 to num_parts - 1, got part {part_id} of {num_parts}")
    if outputs is not None and not is_path(outputs) and len(outputs) != len(images):
        raise ValueError(f"there are {len(images)} cases, but {len(outputs)} output file names")
    without = [str(number) for number, files in enumerate(images) if len(files) == 0]
    if without:
        raise ValueError(f"case number {', '.join(without[:10])} (counted from 0) has no image: list one per channel")
    chosen = [[os.fspath(file) for file in files] for files in images[part_id::num_parts]]
    names = [case_id(files[0], ending) for files in chosen]
    places = None
    if is_path(outputs):
        places = [keep_name(os.path.join(outputs, name), ending, reader) for name in names]
    elif outputs is not None:
        places = [os.fspath(output) for output in outputs[part_id::num_parts]]
    _require_distinct([name_outputs(output, ending, reader)[0] for output in places or []])
    previous = [
        None if previous_stage_folder is None else os.path.join(previous_stage_folder, f"{name}{ending}")
        for name in names
    ]
    return CaseLists(chosen, places, previous)


def without_finished(cases: CaseLists, ending: str, reader: type, save_probabilities: bool) -> CaseLists:
    """Drop the cases whose results are all there."""

    def is_finished(output: str) -> bool:
        labels, probabilities = name_outputs(output, ending, reader)
        files = [f"{labels}{ending}", *([f"{probabilities}.npz", f"{probabilities}.pkl"] if save_probabilities else ())]
        return all(Path(file).is_file() for file in files)

    outputs = cases.outputs or []
    left = [i for i, output in enumerate(outputs) if not is_finished(output)]
    return CaseLists(
        [cases.images[i] for i in left], [outputs[i] for i in left], [cases.previous_stage[i] for i in left]
    )


def require_previous_stage(cases: CaseLists) -> None:
    """Check that the previous stage is there; warn of single cases that it lacks.

    Raises:
        NoPreviousStageError: Not one case has a label map; the message names some.
    """
    missing = [file for file in cases.previous_stage if file is not None and not Path(file).is_file()]
    if not missing:
        return
    fault = (
        f"{len(missing)} of {len(cases.previous_stage)} cases have no prediction of the "
        f"previous stage: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    )
    if len(missing) == len(cases.previous_stage):
        raise NoPreviousStageError(fault)
    logger.warning("%s", fault)


def _check_channels(files: Sequence[str], cases: Sequence[Sequence[str]], dataset_json: Mapping[str, Any]) -> None:
    ending = dataset_json["file_ending"]
    numbers = [int(file[-len(ending) - 4 : -len(ending)]) for file in files]
    expected = len(_channel_names(dataset_json))
    # One file may hold all channels (colour photographs, 4D images), if it does so for every case.
    holds_all = numbers == [0] and all(len(other) == 1 for other in cases)
    if numbers != list(range(expected)) and not holds_all:
        raise ValueError(
            f"case {case_id(files[0], ending)}: found channels {', '.join(f'{n:04d}' for n in numbers)}, but the model "
            f"expects {_describe_channels(dataset_json)}"
        )


def _channel_names(dataset_json: Mapping[str, Any]) -> Mapping[str, str]:
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def _describe_channels(dataset_json: Mapping[str, Any]) -> str:
    names = _channel_names(dataset_json)
    return ", ".join(f"{int(number):04d} = {name}" for number, name in names.items())


def _require_distinct(outputs: Sequence[str]) -> None:
    seen: set[str] = set()
    for output in outputs:
        if output in seen:
            raise ValueError(
                f"two cases would be written to {output}: give their images different names, or list the output files"
            )
        seen.add(output)
