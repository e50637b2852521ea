"""Draw the cases of a raw dataset into `dataset_overview.png`.

Odd ones catch the eye.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.experiment_planning.dataset_look import PERCENTILES, CaseLook, DatasetOverview
from nnunetv2.experiment_planning.overview_picture import draw_overview
from nnunetv2.preprocessed_data.bad_cases import list_training_cases
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.json_files import read_json

OVERVIEW_FILE = "dataset_overview.png"
MAX_CASES = 60
"""Cases that are read, evenly spread over the list. More would take long and change the picture little."""
_MAX_VOXELS = 200_000  # per case and channel; percentiles need no more
_MAX_THREADS = 4  # each holds a case in memory


def write_dataset_overview(raw_folder: Path, fingerprint_file: Path, picture: Path) -> None:
    """Read up to `MAX_CASES` cases and draw their properties.

    Shapes, spacings, intensities and label sizes.

    Args:
        raw_folder: The dataset below nnUNet_raw.
        fingerprint_file: Its fingerprint, with the shapes and spacings of all its cases.
        picture: Where the PNG goes.
    """
    overview = look_at_dataset(raw_folder, fingerprint_file)
    with replacing(picture) as written:
        draw_overview(overview).savefig(written, dpi=110)


def look_at_dataset(raw_folder: Path, fingerprint_file: Path) -> DatasetOverview:
    """Read the content of the picture."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.preprocessing.worker_count import bytes_to_read, choose_num_processes

    dataset_json = read_json(raw_folder / "dataset.json")
    fingerprint = read_json(fingerprint_file)
    dataset = list_training_cases(raw_folder, fingerprint_file.parent, dataset_json)
    first = next(iter(dataset.values()))["images"][0]
    reader = determine_reader_writer_from_dataset_json(dataset_json, first, verbose=False)
    chosen = spread_evenly(list(dataset), MAX_CASES)
    largest = bytes_to_read([*dataset[case]["images"], dataset[case]["label"]] for case in chosen)
    with ThreadPoolExecutor(min(_MAX_THREADS, choose_num_processes(largest, len(chosen)))) as threads:
        looks = list(threads.map(lambda case: look_at_case(case, dataset[case], reader), chosen))
    channels = dataset_json["channel_names" if "channel_names" in dataset_json else "modality"]
    return DatasetOverview(
        dataset_name=raw_folder.name,
        num_cases=len(dataset),
        shapes=np.array(fingerprint["shapes_after_crop"]),
        spacings=np.array(fingerprint["spacings"], dtype=float),
        channel_names=list(channels.values()),
        labels=foreground_labels(dataset_json["labels"]),
        looks=looks,
    )


def look_at_case(case: str, files: Mapping[str, Any], reader_class: type) -> CaseLook:
    """Read one case and describe it."""
    reader = reader_class()
    images, properties = reader.read_images(files["images"])
    label, _ = reader.read_seg(files["label"])
    values, counts = np.unique(label, return_counts=True)
    return CaseLook(
        str(case),
        np.stack([describe_intensities(image, label[0]) for image in images]),
        {int(value): int(count) for value, count in zip(values, counts)},
        float(np.prod(properties["spacing"])),
    )


def describe_intensities(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return `PERCENTILES` of the foreground of an image.

    Without foreground, of all that is not 0.
    """
    foreground = label > 0
    values = image[foreground] if foreground.any() else image[image != 0]
    values = values[:: max(1, len(values) // _MAX_VOXELS)]
    return np.percentile(values, PERCENTILES) if len(values) else np.zeros(len(PERCENTILES))


def foreground_labels(labels: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    """Return the values of each foreground label or region of dataset.json."""
    values = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in labels.items()}
    return {name: list(map(int, of_name)) for name, of_name in values.items() if set(of_name) != {0}}


def spread_evenly(items: Sequence[Any], at_most: int) -> list[Any]:
    """Return all items, or `at_most` of them, the first and the last among them."""
    if len(items) <= at_most:
        return list(items)
    return [items[position] for position in np.linspace(0, len(items) - 1, at_most).round().astype(int)]
