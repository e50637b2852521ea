"""Draw a region of a case: label, prediction, and the image alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from nnunetv2.evaluation.report_pictures import encode_png, slice_axis
from nnunetv2.utilities.label_colours import color_cycle, hex_to_rgb

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

_SIDE = 260
"""Pixels of the longer side of a panel."""
_MARGIN_MM = 12.0
_LEAST_MM = 40.0
"""So much of a slice is shown at least, around its labelled voxels."""


class CasePainter:
    """Hold the arrays of a case while its regions are drawn.

    Args:
        image_file: First channel of the image.
    """

    def __init__(self, label_file: str, prediction_file: str, image_file: str, reader: BaseReaderWriter) -> None:
        label, properties = reader.read_seg(label_file)
        self.label, self.prediction = label[0], reader.read_seg(prediction_file)[0][0]
        self.spacing = [abs(float(size)) or 1.0 for size in properties["spacing"]]
        self.image = np.zeros(self.label.shape, dtype=np.float32)
        if Path(image_file).is_file():
            image = reader.read_images([image_file])[0][0]
            if image.shape == self.label.shape:
                self.image = image
        self.axis = slice_axis(self.spacing, self.label.shape)

    def draw(self, centre: Sequence[int], labels: Sequence[int]) -> tuple[list[str], str]:
        """Return three panels of the slice through a voxel (PNG, base64), and its place.

        Args:
            centre: The voxel `(z, y, x)`.
            labels: Those whose outlines are drawn.
        """
        number = centre[self.axis]
        image, label, prediction = (
            np.take(array, number, axis=self.axis) for array in (self.image, self.label, self.prediction)
        )
        spacing = [size for axis, size in enumerate(self.spacing) if axis != self.axis]
        middle = [one for axis, one in enumerate(centre) if axis != self.axis]
        window = _window(np.isin(label, labels) | np.isin(prediction, labels), middle, spacing)
        grey, label, prediction = _stretch(image)[window], label[window], prediction[window]
        shape = _shape(grey.shape, spacing)
        picture = ndimage.zoom(grey, np.divide(shape, grey.shape), order=1, grid_mode=True, mode="nearest")
        plain = np.repeat(picture[..., None], 3, axis=2).astype(np.uint8)
        panels = [*(_outline(plain, outlined, labels) for outlined in (label, prediction)), plain]
        extent = self.label.shape[self.axis]
        return [encode_png(panel) for panel in panels], (
            f"slice {number + 1} of {extent}" if extent > 1 else "the whole image"
        )


def colour_of(number: int) -> str:
    """Return the colour of the class with this number, counted from 0, as hexadecimal digits."""
    return color_cycle[1 + number % (len(color_cycle) - 1)]


def _window(mask: np.ndarray, middle: Sequence[int], spacing: Sequence[float]) -> tuple[slice, ...]:
    """Return the part to show: labelled voxels, the region's middle, a margin."""
    window = []
    for axis, (size, place) in enumerate(zip(spacing, middle)):
        occupied = np.flatnonzero(mask.any(axis=1 - axis))
        low, high = (
            (min(place, *occupied[[0, -1]]), max(place, *occupied[[0, -1]])) if occupied.size else (place, place)
        )
        margin = max(_MARGIN_MM, (_LEAST_MM - (high - low) * size) / 2) / size
        window.append(slice(max(0, int(low - margin)), int(high + margin) + 1))
    return tuple(window)


def _stretch(image: np.ndarray) -> np.ndarray:
    """Return a slice as float from 0 to 255, without its most extreme values."""
    values = np.nan_to_num(image.astype(np.float32))
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / max(float(high - low), 1e-6), 0, 1) * 255


def _shape(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int]:
    size = np.array(shape) * np.array(spacing)
    rows, columns = np.maximum(8, np.round(size / size.max() * _SIDE)).astype(int)
    return int(rows), int(columns)


def _outline(panel: np.ndarray, labels: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """Draw the outlines of labels, inside of each, over a picture."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(panel.shape, labels.shape))
    enlarged, panel = labels[rows][:, columns], panel.copy()
    for number, label in enumerate(shown):
        mask = enlarged == label
        edge = mask & ~ndimage.binary_erosion(mask, iterations=2, border_value=1)
        panel[edge] = hex_to_rgb(colour_of(number))
    return panel
