"""Give one dataset the plans of another.

A network trained on the one can then be fine-tuned on the other.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.json_files import PLANS, read_json

logger = logging.getLogger(__name__)


def move_plans_between_datasets(
    source_dataset_name_or_id: int | str,
    target_dataset_name_or_id: int | str,
    source_plans_identifier: str,
    target_plans_identifier: str | None = None,
) -> None:
    """Write the plans of the source dataset to the preprocessed folder of the target dataset.

    The reader is chosen for the images of the target. All else stays, the intensities of the source among it, since the
    network has learned with them; only another number of channels needs normalizations of its own, see
    `other_channels.py`. An existing file of the target's name is replaced.

    Args:
        source_plans_identifier: Name of the plans of the source.
        target_plans_identifier: Name of the plans for the target; the same if None.

    Raises:
        InvalidInputError: The source has no such plans, or there is no raw target dataset.
    """
    from nnunetv2.errors import InvalidInputError
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.atomic_write import copy_atomically, save_json_atomically
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    source = maybe_convert_to_dataset_name(source_dataset_name_or_id)
    target = maybe_convert_to_dataset_name(target_dataset_name_or_id)
    target_plans_identifier = target_plans_identifier or source_plans_identifier
    plans_file = Path(nnUNet_preprocessed) / source / f"{source_plans_identifier}.json"
    raw_folder, target_folder = Path(nnUNet_raw) / target, Path(nnUNet_preprocessed) / target
    if not plans_file.is_file():
        raise InvalidInputError(
            f"{plans_file} does not exist: plan {source} first (nnUNetv2_plan_experiment), or "
            f"check the name of the plans"
        )
    if not (raw_folder / "dataset.json").is_file():
        raise InvalidInputError(
            f"{raw_folder / 'dataset.json'} does not exist. The images of the target decide how "
            f"they are read, so its raw dataset is needed"
        )
    plans = rename_plans(
        read_json(plans_file, required=PLANS),
        dataset_name=target,
        source_name=source_plans_identifier,
        target_name=target_plans_identifier,
    )
    dataset_json = read_json(raw_folder / "dataset.json")
    plans = _fit_to_channels(plans, dataset_json, source_folder=plans_file.parent, target_folder=target_folder)
    plans["image_reader_writer"] = _determine_reader(raw_folder, dataset_json)
    target_folder.mkdir(parents=True, exist_ok=True)
    if not (target_folder / "dataset.json").is_file():  # preprocessing goes by it; planning would have copied it
        copy_atomically(raw_folder / "dataset.json", target_folder / "dataset.json")
    save_json_atomically(plans, target_folder / f"{target_plans_identifier}.json", sort_keys=False)


def rename_plans(plans: dict[str, Any], *, dataset_name: str, source_name: str, target_name: str) -> dict[str, Any]:
    """Return plans under another name and for another dataset.

    Folders of preprocessed data are renamed alike.
    """
    configurations = {name: dict(configuration) for name, configuration in plans["configurations"].items()}
    if target_name != source_name:
        for configuration in configurations.values():
            if "data_identifier" in configuration:
                configuration["data_identifier"] = rename_data_identifier(
                    configuration["data_identifier"], source_name, target_name
                )
    return {**plans, "dataset_name": dataset_name, "plans_name": target_name, "configurations": configurations}


def rename_data_identifier(identifier: str, source_name: str, target_name: str) -> str:
    """Replace the name of the plans at the start of a data identifier.

    Or put the new one in front.

    With target "mine", "nnUNetPlans_2d" of nnUNetPlans becomes "mine_2d", of other plans "mine_nnUNetPlans_2d".
    """
    if identifier.startswith(source_name):
        return target_name + identifier.removeprefix(source_name)
    return f"{target_name}_{identifier}"


def _fit_to_channels(
    plans: dict[str, Any], dataset_json: dict[str, Any], *, source_folder: Path, target_folder: Path
) -> dict[str, Any]:
    """Adapt plans to another number of channels, or warn of missing files."""
    from nnunetv2.experiment_planning.plans_for_pretraining.other_channels import adapt_channels

    new = _channel_names(dataset_json)
    planned = {
        len(configuration["normalization_schemes"])
        for configuration in plans["configurations"].values()
        if "normalization_schemes" in configuration
    }
    if planned == {len(new)}:
        return plans
    differ = f"{target_folder.name} has {len(new)} channel(s), the plans are for {', '.join(map(str, sorted(planned)))}"
    fingerprint, source = target_folder / "dataset_fingerprint.json", source_folder / "dataset.json"
    missing = next((path for path in (fingerprint, source) if not path.is_file()), None)
    if missing is not None:
        logger.warning(
            "%s, and there is no %s to adapt their normalization by (nnUNetv2_extract_fingerprint makes fingerprints)",
            differ,
            missing,
        )
        return plans
    old = _channel_names(read_json(source))
    if planned != {len(old)}:
        logger.warning("%s, and %s names %d: its normalization is not adapted", differ, source, len(old))
        return plans
    known = [name for name in new if name in old]
    logger.info(
        "%s. Normalization as it was: %s; chosen and measured anew: %s",
        differ,
        ", ".join(known) or "of none",
        ", ".join(name for name in new if name not in old) or "of none",
    )
    return adapt_channels(plans, old=old, new=new, fingerprint=read_json(fingerprint))


def _channel_names(dataset_json: dict[str, Any]) -> list[str]:
    names = dataset_json["channel_names" if "channel_names" in dataset_json else "modality"]
    return [names[key] for key in sorted(names, key=int)]


def _determine_reader(raw_folder: Path, dataset_json: dict[str, Any]) -> str:
    from nnunetv2.errors import InvalidInputError
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.preprocessed_data.bad_cases import list_training_cases

    dataset = list_training_cases(raw_folder, Path(nnUNet_preprocessed) / raw_folder.name, dataset_json)
    if not dataset:
        raise InvalidInputError(f"{raw_folder} has no training images")
    example = next(iter(dataset.values()))["images"][0]
    return determine_reader_writer_from_dataset_json(
        dataset_json, example, allow_nonmatching_filename=True, verbose=False
    ).__name__


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Give a dataset the plans of another, for pretraining: plan the dataset to "
        "fine-tune on, move its plans to the one to pretrain on, preprocess and train "
        "that, then use its checkpoint as -pretrained_weights."
    )
    parser.add_argument("-s", required=True, metavar="DATASET", help="Dataset that has the plans: number or name.")
    parser.add_argument("-t", required=True, metavar="DATASET", help="Dataset that gets them: number or name.")
    parser.add_argument("-sp", required=True, metavar="NAME", help="Name of the plans, such as nnUNetPlans.")
    parser.add_argument(
        "-tp",
        default=None,
        metavar="NAME",
        help="Their name at the target. Default: the same. Give another if the target has plans of "
        "that name, which would be replaced.",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    move_plans_between_datasets(arguments.s, arguments.t, arguments.sp, arguments.tp)


def entry_point_move_plans_between_datasets() -> None:
    run_command(main)
