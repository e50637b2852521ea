"""Read and write 2D images: png, bmp, tif."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter, FilePath
from nnunetv2.imageio.channels import as_labels, list_files, naming, require_single_channel, stack_channels
from nnunetv2.utilities.atomic_write import replacing

logger = logging.getLogger(__name__)


class NaturalImage2DIO(BaseReaderWriter):
    """Gray and colour images.

    Colours become channels, red first; the missing first axis gets a spacing of 999.
    """

    supported_file_endings = [".png", ".bmp", ".tif"]

    def read_images(self, image_fnames: Sequence[FilePath]) -> tuple[np.ndarray, dict]:
        """Read gray `(x, y)` or colour images `(x, y, 3 or 4)` as channels.

        Raises:
            AssertionError: An image has another shape.
            RuntimeError: The images have different sizes.
        """
        files = list_files(image_fnames)
        images = [_channels_first(_read(file), file) for file in files]
        return stack_channels(images, files), {"spacing": (999, 1, 1)}

    def read_seg(self, seg_fname: FilePath) -> tuple[np.ndarray, dict]:
        """Read a label map stored as gray values, or as palette numbers.

        Raises:
            RuntimeError: It has colours.
        """
        seg, properties = self.read_images((seg_fname,))
        if len(seg) > 1 and (numbers := _read_palette_numbers(seg_fname)) is not None:
            return numbers[None, None].astype(np.float32), properties
        require_single_channel(seg, seg_fname)
        return seg, properties

    def write_seg(self, seg: np.ndarray, output_fname: FilePath, properties: dict) -> None:
        """Write a label map `(1, x, y)` as gray values."""
        with replacing(output_fname) as file:
            _write(str(file), as_labels(seg[0]))


def _read(file: str) -> np.ndarray:
    with naming(file):
        if not _is_tif(file):
            import imageio.v3

            return np.asarray(imageio.v3.imread(file))
        import tifffile

        image = tifffile.imread(file)
    has_channels_first = image.ndim > 2 and image.shape[-1] not in (3, 4) and image.shape[-3] in (3, 4)
    return np.moveaxis(image, -3, -1) if has_channels_first else image


def _write(file: str, labels: np.ndarray) -> None:
    if not _is_tif(file):
        import imageio.v3

        imageio.v3.imwrite(file, labels)
        return
    import tifffile

    # without a photometric, three or four rows would be taken for colours
    tifffile.imwrite(file, labels, photometric="minisblack")


def _is_tif(file: str) -> bool:
    return file.lower().endswith((".tif", ".tiff"))


def _read_palette_numbers(file: FilePath) -> np.ndarray | None:
    """Return the numbers `(x, y)` that stand for colours, which VOC-like tools use as labels; None without palette."""
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image) if image.mode == "P" else None


def _channels_first(image: np.ndarray, file: str) -> np.ndarray:
    """Turn `(x, y)` or `(x, y, c)` into `(c, 1, x, y)`."""
    if image.ndim == 2:
        return image[None, None]
    assert image.ndim == 3 and image.shape[-1] in (3, 4), (
        f"{file} has shape {image.shape}; expected a gray image (x, y) or colours (x, y, 3 or 4). Convert it, for "
        "example to gray; 3D stacks need another reader"
    )
    if image.shape[-1] == 4:
        _warn_of_alpha_once()
    return np.moveaxis(image, -1, 0)[:, None]


@lru_cache(maxsize=1)
def _warn_of_alpha_once() -> None:
    logger.warning(
        "images with an alpha channel are read as four channels. If alpha means nothing, remove it from "
        "the files and from channel_names in dataset.json"
    )
