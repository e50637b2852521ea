"""Read and write 3D tif stacks, with their spacing in a JSON file beside them.

`CASE_0000.tif`, `CASE_0001.tif` and the label map `CASE.tif` share the layout of `CASE.json`: {"spacing": [a, b, c]},
in the order of the array's axes, that of the pages first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from os import fspath
from pathlib import Path

import numpy as np

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter, FilePath
from nnunetv2.imageio.channels import as_labels, list_files, naming, stack_channels
from nnunetv2.imageio.faults import Fault
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.file_endings import strip_ending
from nnunetv2.utilities.json_export import fix_types_iterable
from nnunetv2.utilities.json_files import read_json

logger = logging.getLogger(__name__)

_LENGTH_OF_CHANNEL = len("_0000")


class Tiff3DIO(BaseReaderWriter):
    """3D stacks. Without a JSON file beside it, an image has spacing (1, 1, 1)."""

    supported_file_endings = [".tif", ".tiff"]

    def read_images(self, image_fnames: Sequence[FilePath]) -> tuple[np.ndarray, dict]:
        """Read the channels of a case, and its spacing.

        That is in the JSON file named like the case.

        Raises:
            AssertionError: A file ends otherwise, or the JSON file has no valid spacing.
            RuntimeError: An image does not have three axes, or shapes differ.
        """
        files = list_files(image_fnames)
        images = [_read(file) for file in files]
        return stack_channels(images, files), {"spacing": _read_spacing(_side_car(files[0]), files[0])}

    def read_seg(self, seg_fname: FilePath) -> tuple[np.ndarray, dict]:
        """Read a label map as float32 `(1, x, y, z)`.

        Its spacing is in the JSON file named like it.
        """
        (file,) = list_files((seg_fname,))
        spacing = _read_spacing(_side_car(file, is_label=True), file)
        assert all(entry > 0 for entry in spacing), f"the spacing {spacing} of {file} must be above 0"
        return _read(file).astype(np.float32), {"spacing": spacing}

    def write_seg(self, seg: np.ndarray, output_fname: FilePath, properties: dict) -> None:
        """Write a label map `(x, y, z)`, compressed, and its spacing beside it."""
        import tifffile

        spacing = fix_types_iterable(properties["spacing"], list)
        with replacing(output_fname) as file:
            Path(f"{_strip_tif(fspath(file))}.json").write_text(json.dumps({"spacing": spacing}, indent=4))
            # without a photometric, three or four columns would be taken for colours
            tifffile.imwrite(file, as_labels(seg), compression="zlib", photometric="minisblack")

    def list_side_cars(self, fname: FilePath, is_label: bool = False) -> list[str]:
        """Return the JSON file with the spacing."""
        return [_side_car(fspath(fname), is_label)]

    def find_faults(self, fname: FilePath, is_label: bool = False) -> list[Fault]:
        """Find that the spacing is not given.

        A wrong one makes wrong plans, so it should not be taken by default.
        """
        side_car = Path(_side_car(fspath(fname), is_label))
        if side_car.is_file():
            return []
        return [
            Fault(
                "the spacing of a tif is not given",
                "",
                side_car.name,
                'write {"spacing": [a, b, c]} into this file beside the tif, in mm, pages first; [1, 1, 1] if '
                "nothing is known",
            )
        ]


def _read(file: str) -> np.ndarray:
    """Read a stack as `(1, x, y, z)`."""
    import tifffile

    _strip_tif(file)
    with naming(file):
        image = tifffile.imread(file)
    if image.ndim != 3:
        raise RuntimeError(
            f"{file} has {image.ndim} axes, shape {image.shape}; this reader takes 3D stacks only. "
            "Gray and colour images in 2D are read by NaturalImage2DIO"
        )
    return image[None]


def _side_car(file: str, is_label: bool = False) -> str:
    """Return the JSON file of an image CASE_0000.tif or a label CASE.tif."""
    stem = _strip_tif(file)
    return f"{stem if is_label else stem[:-_LENGTH_OF_CHANNEL]}.json"


def _strip_tif(file: str) -> str:
    ending = file[file.rfind(".") :]
    assert ending.lower() in Tiff3DIO.supported_file_endings, (
        f"{file} must end in {' or '.join(Tiff3DIO.supported_file_endings)}"
    )
    return strip_ending(file, ending)


def _read_spacing(json_file: str, image_file: str) -> Sequence[float]:
    if not Path(json_file).is_file():
        logger.warning("%s: there is no %s, so the spacing is taken to be (1, 1, 1)", image_file, json_file)
        return (1, 1, 1)
    try:
        content = read_json(json_file)
    except ValueError as error:
        raise RuntimeError(f'{error}; it must hold {{"spacing": [a, b, c]}}') from error
    spacing = content.get("spacing")
    assert isinstance(spacing, list) and len(spacing) == 3 and all(map(_is_number, spacing)), (
        f'{json_file} must hold {{"spacing": [a, b, c]}}, three numbers, first that of the pages; it holds {content}'
    )
    return spacing


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
