"""Summarize the plans and the preprocessed data of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.experiment_planning.experiment_planners.hints import find_too_small
from nnunetv2.utilities.plain_text import printable, shell_command

if TYPE_CHECKING:
    from nnunetv2.plans.plans_manager import PlansManager

_HEADINGS = ("configuration", "spacing [mm]", "median image", "patch", "batch", "stages", "preprocessed data")


@dataclass(frozen=True)
class FolderUse:
    """The content of a folder of preprocessed data."""

    num_cases: int
    num_bytes: int


def measure_folder(folder: Path) -> FolderUse:
    """Count the cases and bytes of a folder of preprocessed data.

    A missing folder is empty.
    """
    if not folder.is_dir():
        return FolderUse(0, 0)
    files = [file for file in folder.iterdir() if file.is_file()]
    return FolderUse(sum(file.suffix == ".pkl" for file in files), sum(file.stat().st_size for file in files))


def summarise(plans_manager: PlansManager, dataset_folder: Path, num_cases: int, *, trainer: str | None = None) -> str:
    """Return a table of all configurations, one per line, and how to go on.

    Args:
        dataset_folder: The dataset's folder below nnUNet_preprocessed.
        num_cases: Training cases of the dataset.
        trainer: The trainer to go on with, if that is not the usual one.
    """
    rows = [
        _HEADINGS,
        *(_describe(plans_manager, name, dataset_folder, num_cases) for name in plans_manager.available_configurations),
    ]
    title = printable(f"{plans_manager.dataset_name}: {num_cases} training cases, plans {plans_manager.plans_name}")
    return "\n".join(["", title, *_lay_out(rows), "", *_describe_next_step(plans_manager, trainer)])


def format_bytes(num_bytes: float) -> str:
    """Return a size for people: 1500 -> "1.5 KB". Units are powers of 1000."""
    units = ("bytes", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(log10(max(num_bytes, 1))) // 3)
    amount = num_bytes / 1000**power
    return f"{amount:.0f} {units[power]}" if power == 0 or amount >= 100 else f"{amount:.1f} {units[power]}"


def _describe(plans_manager: PlansManager, name: str, dataset_folder: Path, num_cases: int) -> tuple[str, ...]:
    configuration = plans_manager.get_configuration(name)
    stages = len(configuration.pool_op_kernel_sizes)
    data = _describe_data(measure_folder(dataset_folder / configuration.data_identifier), num_cases)
    if configuration.previous_stage_name is not None:
        data += printable(f"; starts from predictions of {configuration.previous_stage_name}")
    return (
        printable(name),
        _times(f"{s:.3g}" for s in configuration.spacing),
        _times(f"{length:g}" for length in configuration.median_image_size_in_voxels),
        _times(map(str, configuration.patch_size)),
        str(configuration.batch_size),
        str(stages),
        data,
    )


def _describe_data(use: FolderUse, num_cases: int) -> str:
    if not use.num_cases:
        return "none yet"
    cases = f"{use.num_cases} cases" if use.num_cases == num_cases else f"{use.num_cases} of {num_cases} cases"
    return f"{format_bytes(use.num_bytes)}, {cases}"


def _describe_next_step(plans_manager: PlansManager, trainer: str | None) -> list[str]:
    """Return the command that trains, and why some configurations cannot be trained."""
    configurations = {
        name: plans_manager.get_configuration(name).configuration for name in plans_manager.available_configurations
    }
    too_small = find_too_small(configurations)
    trainable = [name for name in configurations if name not in too_small]
    if not trainable:
        return [*too_small.values(), "Next: correct the images, and plan again"]
    return [*too_small.values(), f"Next: {_training_command(plans_manager, trainable, trainer)}"]


def _training_command(plans_manager: PlansManager, names: Sequence[str], trainer: str | None) -> str:
    configuration = "3d_fullres" if "3d_fullres" in names else names[0]
    trainers = [] if trainer is None else [("-tr", trainer)]
    plans = [] if plans_manager.plans_name == "nnUNetPlans" else [("-p", plans_manager.plans_name)]
    return shell_command("nnUNetv2_train", plans_manager.dataset_name, configuration, 0, options=trainers + plans)


def _lay_out(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _times(numbers: Iterable[str]) -> str:
    return " x ".join(numbers)
