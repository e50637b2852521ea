"""Write the dataset.json of a raw dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

_NOT_GIVEN = "not given; whoever converted the dataset should fill this in"


def generate_dataset_json(
    output_folder: str | os.PathLike[str],
    channel_names: Mapping[str | int, str],
    labels: Mapping[str, int | Sequence[int]],
    num_training_cases: int,
    file_ending: str,
    citation: Sequence[str] | str | None = None,
    regions_class_order: Sequence[int] | None = None,
    dataset_name: str | None = None,
    reference: str | None = None,
    release: str | None = None,
    description: str | None = None,
    overwrite_image_reader_writer: str | None = None,
    license: str = _NOT_GIVEN,
    converted_by: str = _NOT_GIVEN,
    **kwargs: object,
) -> None:
    """Write dataset.json into the folder of a raw dataset.

    Args:
        output_folder: Folder of the dataset, which exists.
        channel_names: Channel number -> name, {0: "T1", 1: "CT"}. The name selects the normalization.
        labels: Name -> label, {"background": 0, "liver": 1}; or name -> labels, a region: {"whole tumour": (1, 2, 3)}.
        num_training_cases: Number of training cases.
        file_ending: Ending of images and labels, with dot.
        citation: The publications to cite when the dataset is used.
        regions_class_order: The label that each region gets in a label map, in the order in which they are written,
            later over earlier ones. Required with regions.
        dataset_name: Name of the dataset.
        reference: Where the dataset comes from.
        release: Its version.
        description: Its content in words.
        overwrite_image_reader_writer: Name of the class that reads the images, if the ending does not decide.
        license: Licence of the data.
        converted_by: Who to ask about the conversion.
        **kwargs: Further entries, which may replace those above.

    Raises:
        AssertionError: There are regions, but no regions_class_order.
    """
    has_regions = any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values())
    assert not has_regions or regions_class_order is not None, (
        "labels with several values (regions) need regions_class_order"
    )
    content = {
        "channel_names": {str(number): name for number, name in channel_names.items()},
        "labels": {
            name: tuple(int(label) for label in value) if isinstance(value, (list, tuple)) else int(value)
            for name, value in labels.items()
        },
        "numTraining": num_training_cases,
        "file_ending": file_ending,
        "licence": license,
        "converted_by": converted_by,
    }
    optional = {
        "name": dataset_name,
        "reference": reference,
        "release": release,
        "citation": citation,
        "description": description,
        "overwrite_image_reader_writer": overwrite_image_reader_writer,
        "regions_class_order": regions_class_order,
    }
    content.update({key: value for key, value in optional.items() if value is not None})
    content.update(kwargs)
    recursive_fix_for_json_export(content)
    save_json_atomically(content, Path(output_folder, "dataset.json"), sort_keys=False)
