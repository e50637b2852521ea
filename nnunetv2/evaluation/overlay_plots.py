"""Write a PNG per training case: its most telling slice with the labels in colour."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.command_line import run_command
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.label_colours import color_cycle, generate_overlay, hex_to_rgb
from nnunetv2.utilities.legacy_names import file_helpers_of
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.preprocessed_data.datasets import nnUNetBaseDataset

__all__ = [
    "color_cycle",
    "hex_to_rgb",
    "generate_overlay",
    "select_slice_to_plot",
    "select_slice_to_plot2",
    "plot_overlay",
    "plot_overlay_preprocessed",
    "multiprocessing_plot_overlay",
    "multiprocessing_plot_overlay_preprocessed",
    "generate_overlays_from_raw",
    "generate_overlays_from_preprocessed",
    "entry_point_generate_overlay",
]

__getattr__ = file_helpers_of(__name__)


def select_slice_to_plot(image: np.ndarray, segmentation: np.ndarray) -> int:
    """Return the index along the first axis of the slice with most foreground."""
    return int(np.argmax([np.count_nonzero(part > 0) for part in segmentation]))


def select_slice_to_plot2(image: np.ndarray, segmentation: np.ndarray) -> int:
    """Return the index of the slice with the largest share of all classes.

    Along the first axis.

    For each class counts which fraction of its voxels lies in a slice; the slice with the highest mean of these
    fractions shows small classes, too. 0 without any foreground.
    """
    classes = [label for label in np.unique(segmentation) if label > 0]
    if not classes:
        return 0
    rows = segmentation.reshape(len(segmentation), -1)
    counts = np.array([np.count_nonzero(rows == label, axis=1) for label in classes])
    return int(np.argmax(np.mean(counts / counts.sum(axis=1, keepdims=True), axis=0)))


def plot_overlay(
    image_file: str,
    segmentation_file: str,
    image_reader_writer: BaseReaderWriter,
    output_file: str,
    overlay_intensity: float = 0.6,
) -> None:
    """Write the picture of a case from its files.

    Args:
        image_file: One channel. Of an image with several values per pixel, the first is shown.

    Raises:
        ValueError: Image and label map differ in shape.
    """
    image = image_reader_writer.read_images((image_file,))[0]
    segmentation = image_reader_writer.read_seg(segmentation_file)[0]
    _plot(image[0], segmentation[0], output_file, overlay_intensity, f"{image_file} and {segmentation_file}")


def plot_overlay_preprocessed(
    dataset: nnUNetBaseDataset, k: str, output_folder: str, overlay_intensity: float = 0.6, channel_idx: int = 0
) -> None:
    """Write the picture of a preprocessed case into `output_folder`/`k`.png.

    Raises:
        ValueError: The case has no such channel.
    """
    data, labels = dataset.load_case(k)[:2]
    if not 0 <= channel_idx < data.shape[0]:
        raise ValueError(f"case {k} has {data.shape[0]} channels; there is no channel {channel_idx} (-channel_idx)")
    segmentation = np.maximum(np.asarray(labels[0]), 0)  # -1 marks voxels that cropping found to be outside
    _plot(np.asarray(data[channel_idx]), segmentation, os.path.join(output_folder, f"{k}.png"), overlay_intensity, k)


def multiprocessing_plot_overlay(
    list_of_image_files: Sequence[str],
    list_of_seg_files: Sequence[str],
    image_reader_writer: BaseReaderWriter,
    list_of_output_files: Sequence[str],
    overlay_intensity: float,
    num_processes: int = 8,
) -> None:
    """Write the pictures of several cases; see `plot_overlay`."""
    plot = partial(_plot_files, reader=image_reader_writer, overlay_intensity=overlay_intensity)
    files = zip(list_of_image_files, list_of_seg_files, list_of_output_files)
    _plot_cases(
        plot,
        {Path(output).stem: (image, seg, output) for image, seg, output in files},
        num_processes,
        [*list_of_image_files, *list_of_seg_files],
    )


def multiprocessing_plot_overlay_preprocessed(
    dataset: nnUNetBaseDataset,
    output_folder: str,
    overlay_intensity: float,
    num_processes: int = 8,
    channel_idx: int = 0,
) -> None:
    """Write the pictures of all preprocessed cases; see `plot_overlay_preprocessed`."""
    plot = partial(
        _plot_preprocessed,
        dataset=dataset,
        output_folder=output_folder,
        overlay_intensity=overlay_intensity,
        channel_idx=channel_idx,
    )
    files = [str(file) for file in Path(dataset.source_folder).iterdir()]
    _plot_cases(plot, {case: (case,) for case in dataset.identifiers}, num_processes, files)


def generate_overlays_from_raw(
    dataset_name_or_id: int | str,
    output_folder: str,
    num_processes: int = 8,
    channel_idx: int = 0,
    overlay_intensity: float = 0.6,
) -> None:
    """Write the pictures of a raw dataset's training cases, `output_folder`/CASE.png.

    Raises:
        FileNotFoundError: The dataset does not exist, or has no training case.
        ValueError: There is no such channel.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    folder = Path(nnUNet_raw, maybe_convert_to_dataset_name(dataset_name_or_id))
    if not (folder / "dataset.json").is_file():
        raise FileNotFoundError(f"there is no {folder / 'dataset.json'}")
    dataset_json = read_json(folder / "dataset.json")
    cases = get_filenames_of_train_images_and_targets(str(folder), dataset_json)
    if not cases:
        raise FileNotFoundError(f"{folder} has no training case")
    short = next((case for case, files in cases.items() if not 0 <= channel_idx < len(files["images"])), None)
    if short is not None:
        raise ValueError(
            f"case {short} has {len(cases[short]['images'])} image files; there is no channel "
            f"{channel_idx} (-channel_idx)"
        )
    example = next(iter(cases.values()))["images"][channel_idx]
    reader = determine_reader_writer_from_dataset_json(dataset_json, example)()
    Path(output_folder).mkdir(parents=True, exist_ok=True)
    multiprocessing_plot_overlay(
        [files["images"][channel_idx] for files in cases.values()],
        [files["label"] for files in cases.values()],
        reader,
        [os.path.join(output_folder, f"{case}.png") for case in cases],
        overlay_intensity,
        num_processes,
    )


def generate_overlays_from_preprocessed(
    dataset_name_or_id: int | str,
    output_folder: str,
    num_processes: int = 8,
    channel_idx: int = 0,
    configuration: str | None = None,
    plans_identifier: str = "nnUNetPlans",
    overlay_intensity: float = 0.6,
) -> None:
    """Write the pictures of a dataset's preprocessed cases, `output_folder`/CASE.png.

    Args:
        configuration: Default: 3d_fullres if the plans have it, else 2d.

    Raises:
        RuntimeError: The dataset has not been preprocessed for this configuration.
    """
    from nnunetv2.plans.plans_manager import PlansManager
    from nnunetv2.preprocessed_data.datasets import infer_dataset_class

    folder = Path(nnUNet_preprocessed, maybe_convert_to_dataset_name(dataset_name_or_id))
    plans_file = folder / f"{plans_identifier}.json"
    if not plans_file.is_file():
        raise RuntimeError(
            f"there is no {plans_file}; plan and preprocess the dataset first, or plot the raw images (--use_raw)"
        )
    plans = PlansManager(plans_file)
    if configuration is None:
        configuration = "3d_fullres" if "3d_fullres" in plans.available_configurations else "2d"
    cases_folder = folder / plans.get_configuration(configuration).data_identifier
    if not cases_folder.is_dir():
        raise RuntimeError(f"{configuration} has not been preprocessed: there is no {cases_folder}")
    dataset = infer_dataset_class(str(cases_folder))(str(cases_folder))
    Path(output_folder).mkdir(parents=True, exist_ok=True)
    multiprocessing_plot_overlay_preprocessed(dataset, output_folder, overlay_intensity, num_processes, channel_idx)


def entry_point_generate_overlay() -> None:
    """Run `nnUNetv2_plot_overlay_pngs`."""

    def plot() -> None:
        args = build_parser().parse_args()
        if args.use_raw:
            generate_overlays_from_raw(args.d, args.o, args.np, args.channel_idx, args.overlay_intensity)
        else:
            generate_overlays_from_preprocessed(
                args.d, args.o, args.np, args.channel_idx, args.c, args.p, args.overlay_intensity
            )

    run_command(plot)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_plot_overlay_pngs`."""
    from nnunetv2.configuration import default_num_processes

    parser = argparse.ArgumentParser(
        description="Write a PNG per training case: the slice that shows most of its labels, in colour."
    )
    parser.add_argument("-d", required=True, help="Dataset name or id.")
    parser.add_argument("-o", required=True, help="Output folder; created if needed.")
    parser.add_argument(
        "-np",
        type=int,
        default=default_num_processes,
        help=f"Cases worked on at the same time. Default: {default_num_processes}",
    )
    parser.add_argument("-channel_idx", type=int, default=0, help="Image channel to show. Default: 0")
    parser.add_argument("--use_raw", action="store_true", help="Show raw images instead of preprocessed ones.")
    parser.add_argument("-p", default="nnUNetPlans", help="Plans, for preprocessed images. Default: nnUNetPlans")
    parser.add_argument(
        "-c", default=None, help="Configuration, for preprocessed images. Default: 3d_fullres if planned, else 2d"
    )
    parser.add_argument(
        "-overlay_intensity", type=float, default=0.6, help="How strongly labels cover the image. Default: 0.6"
    )
    return parser


def _plot_files(image: str, seg: str, output: str, *, reader: BaseReaderWriter, overlay_intensity: float) -> None:
    plot_overlay(image, seg, reader, output, overlay_intensity)


def _plot_preprocessed(
    case: str, *, dataset: nnUNetBaseDataset, output_folder: str, overlay_intensity: float, channel_idx: int
) -> None:
    plot_overlay_preprocessed(dataset, case, output_folder, overlay_intensity, channel_idx)


def _plot_cases(plot: partial, cases: dict[str, tuple], num_processes: int, files: Sequence[str]) -> None:
    from nnunetv2.utilities.map_cases import map_cases

    map_cases(plot, cases, num_processes, files)


def _plot(image: np.ndarray, segmentation: np.ndarray, output_file: str, intensity: float, what: str) -> None:
    """Write the most telling slice of an image and its label map, both `(x, y, z)`."""
    from matplotlib.image import imsave

    if image.shape != segmentation.shape:
        raise ValueError(f"{what}: the image has shape {image.shape}, the label map {segmentation.shape}")
    chosen = select_slice_to_plot2(image, segmentation)
    picture = generate_overlay(image[chosen], segmentation[chosen], overlay_intensity=intensity)
    with replacing(output_file) as written:
        imsave(str(written), picture)
