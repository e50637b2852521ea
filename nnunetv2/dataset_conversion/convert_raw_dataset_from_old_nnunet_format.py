"""Turn a raw dataset of nnU-Net 1 into one of nnU-Net 2.

The files stay, dataset.json changes.
"""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.json_files import read_json

FOLDERS = ("imagesTr", "labelsTr")
OPTIONAL_FOLDERS = ("imagesTs", "labelsTs", "imagesVal", "labelsVal")
_NO_LONGER_USED = ("tensorImageSize", "numTest", "training", "test", "modality")


def convert(source_folder: str, target_dataset_name: str) -> None:
    """Copy a dataset of nnU-Net 1 to nnUNet_raw.

    It appears there when all of it has been copied.

    Args:
        source_folder: Has imagesTr, labelsTr, dataset.json and maybe images and labels for testing and validation.
        target_dataset_name: DatasetNNN_Name.

    Raises:
        InvalidInputError: The folder is no such dataset, or the target's name is not one.
        RuntimeError: The target, or another dataset of its number, exists.
    """
    from nnunetv2.dataset_conversion.new_dataset import building_dataset

    source = Path(source_folder)
    _require_complete(source)
    dataset_json = convert_dataset_json(source / "dataset.json")
    with building_dataset(target_dataset_name) as target:
        for name in (*FOLDERS, *OPTIONAL_FOLDERS):
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name)
        (target / "dataset.json").write_text(json.dumps(dataset_json, indent=4), encoding="utf-8")


def convert_dataset_json(file: Path) -> dict[str, Any]:
    """Return the content of our dataset.json for that of nnU-Net 1.

    Raises:
        InvalidInputError: It lacks labels or channels.
    """
    from nnunetv2.dataset_conversion.new_dataset import invert_labels, require_keys

    content = read_json(file)
    require_keys(content, ("labels", "modality"), file)
    kept = {key: value for key, value in content.items() if key not in _NO_LONGER_USED}
    return {
        **kept,
        "channel_names": content["modality"],
        "labels": invert_labels(content["labels"]),
        "file_ending": ".nii.gz",
    }


def _require_complete(source: Path) -> None:
    from nnunetv2.errors import InvalidInputError

    missing = [name for name in FOLDERS if not (source / name).is_dir()]
    missing += [name for name in ("dataset.json",) if not (source / name).is_file()]
    if missing:
        raise InvalidInputError(
            f"{source} lacks {', '.join(missing)}. Is it a raw dataset of nnU-Net 1, a folder such as Task005_Prostate?"
        )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Convert a raw dataset of nnU-Net 1, a folder TaskNNN_Name of "
        "nnUNet_raw_data. The copy is written to nnUNet_raw."
    )
    parser.add_argument("input_folder", help="The dataset of nnU-Net 1.")
    parser.add_argument("output_dataset_name", help="Name of the new dataset: DatasetNNN_Name.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    convert(arguments.input_folder, arguments.output_dataset_name)


def convert_entry_point() -> None:
    run_command(main)
