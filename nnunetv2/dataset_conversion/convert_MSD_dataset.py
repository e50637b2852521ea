"""Turn a dataset of the Medical Segmentation Decathlon into a raw dataset."""

from __future__ import annotations

import json
import os
import re
import shutil
from argparse import ArgumentParser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.json_files import read_json

ENDING = ".nii.gz"


def convert_msd_dataset(
    source_folder: str, overwrite_target_id: int | None = None, num_processes: int = default_num_processes
) -> None:
    """Convert a folder TaskNN_Name into nnUNet_raw/DatasetNNN_Name.

    Images with a time axis, which holds their channels, are split into one file per channel. The dataset appears when
    all of it has been written.

    Args:
        source_folder: Has imagesTr, labelsTr, dataset.json and maybe imagesTs.
        overwrite_target_id: Number of the dataset instead of that of the task.
        num_processes: Files converted at a time.

    Raises:
        InvalidInputError: The folder is no such dataset, or the number is taken.
        RuntimeError: An image has neither three nor four axes.
    """
    from nnunetv2.dataset_conversion.new_dataset import building_dataset

    # Absolute for -i . within the folder; a link keeps its name, which names the task.
    source = Path(os.path.abspath(source_folder))  # noqa: PTH100  resolve() follows links
    task_id, name = parse_task_name(source)
    target_id = task_id if overwrite_target_id is None else overwrite_target_id
    dataset_json = convert_dataset_json(source / "dataset.json")
    with building_dataset(f"Dataset{target_id:03d}_{name}") as target:
        jobs = [
            (split_4d_nifti, file, target / folder.name)
            for folder in _image_folders(source)
            for file in list_images(folder)
        ]
        jobs += [(_copy_into, file, target / "labelsTr") for file in list_images(source / "labelsTr")]
        for folder in {folder for _, _, folder in jobs}:
            folder.mkdir()
        with ThreadPoolExecutor(max(1, num_processes)) as threads:
            list(threads.map(lambda job: job[0](str(job[1]), str(job[2])), jobs))
        (target / "dataset.json").write_text(json.dumps(dataset_json, indent=4), encoding="utf-8")


def parse_task_name(source: Path) -> tuple[int, str]:
    """Return number and name of a task, such as (1, "BrainTumour").

    Of Task01_BrainTumour, a folder that exists and is whole.

    Raises:
        InvalidInputError: The folder has another name, or something is missing in it.
    """
    from nnunetv2.errors import InvalidInputError

    match = re.fullmatch(r"Task(\d+)_(.+)", source.name)
    if match is None:
        raise InvalidInputError(
            f"{source} must be a folder named as in the Decathlon: Task, a number, an underscore "
            f"and a name, such as Task01_BrainTumour"
        )
    missing = [name for name in ("imagesTr", "labelsTr") if not (source / name).is_dir()]
    missing += [name for name in ("dataset.json",) if not (source / name).is_file()]
    if missing:
        raise InvalidInputError(f"{source} lacks {', '.join(missing)}. Is it the unpacked folder of a Decathlon task?")
    return int(match[1]), match[2]


def convert_dataset_json(file: Path) -> dict[str, Any]:
    """Return the content of our dataset.json for that of a task.

    Raises:
        InvalidInputError: It lacks labels or channels.
    """
    from nnunetv2.dataset_conversion.new_dataset import invert_labels, require_keys

    content = read_json(file)
    require_keys(content, ("labels", "modality"), file)
    kept = {key: value for key, value in content.items() if key not in ("modality", "training", "test")}
    return {
        **kept,
        "labels": invert_labels(content["labels"]),
        "file_ending": ENDING,
        "channel_names": content["modality"],
    }


def list_images(folder: Path) -> list[Path]:
    """Return the sorted images of a folder, without the hidden files that some archives carry."""
    return sorted(
        file for file in folder.iterdir() if file.name.endswith(ENDING) and not file.name.startswith((".", "_"))
    )


def split_4d_nifti(filename: str, output_folder: str) -> None:
    """Write an image as one file per channel: CASE_0000.nii.gz, CASE_0001.nii.gz and so on.

    An image of three axes has one channel and is copied as it is.

    Raises:
        RuntimeError: The image has neither three nor four axes.
    """
    import SimpleITK as sitk

    base = Path(filename).name.removesuffix(ENDING)
    reader = sitk.ImageFileReader()
    reader.SetFileName(filename)
    reader.ReadImageInformation()
    if reader.GetDimension() == 3:
        shutil.copy(filename, Path(output_folder) / f"{base}_0000{ENDING}")
    elif reader.GetDimension() == 4:
        for channel, image in enumerate(_split_along_time(reader.Execute())):
            sitk.WriteImage(image, str(Path(output_folder) / f"{base}_{channel:04d}{ENDING}"))
    else:
        raise RuntimeError(f"{filename} has {reader.GetDimension()} axes, expected 3, or 4 where the last are channels")


def _split_along_time(image: Any) -> list[Any]:
    """Return the 3-D images of a 4-D one, each with its place in space."""
    import SimpleITK as sitk

    direction = image.GetDirection()  # 4 x 4, row by row
    spatial_direction = [direction[4 * row + column] for row in range(3) for column in range(3)]
    parts = []
    for array in sitk.GetArrayViewFromImage(image):
        part = sitk.GetImageFromArray(array)
        part.SetSpacing(image.GetSpacing()[:3])
        part.SetOrigin(image.GetOrigin()[:3])
        part.SetDirection(spatial_direction)
        parts.append(part)
    return parts


def _image_folders(source: Path) -> list[Path]:
    return [source / name for name in ("imagesTr", "imagesTs") if (source / name).is_dir()]


def _copy_into(file: str, folder: str) -> None:
    shutil.copy(file, folder)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Convert a dataset of the Medical Segmentation Decathlon. It is written to nnUNet_raw."
    )
    parser.add_argument("-i", required=True, metavar="FOLDER", help="Unpacked folder, such as Task04_Hippocampus.")
    parser.add_argument(
        "-overwrite_id",
        type=int,
        default=None,
        metavar="ID",
        help="Number of the new dataset. Default: that of the task.",
    )
    parser.add_argument(
        "-np",
        type=int,
        default=default_num_processes,
        metavar="N",
        help=f"Files converted at a time. Default: {default_num_processes}",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    convert_msd_dataset(arguments.i, arguments.overwrite_id, arguments.np)


def entry_point() -> None:
    run_command(main)
