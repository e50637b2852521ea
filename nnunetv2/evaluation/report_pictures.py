"""Draw a case for the report as one PNG.

Reference, prediction and where they differ, side by side.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.evaluation.summary import LabelOrRegion, labels_of
from nnunetv2.utilities.label_colours import color_cycle, generate_overlay

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

MISSED, TOO_MUCH, OTHER_CLASS = (230, 25, 75), (255, 225, 25), (67, 99, 216)
_MAX_SIDE = 400
_GAP = 4


def draw_case(
    case: Mapping[str, Any], classes: Sequence[LabelOrRegion], reader: BaseReaderWriter, image_file: str | None
) -> tuple[str, str]:
    """Return a case's picture (PNG in base64) and its slice in words.

    Args:
        case: An entry of `metric_per_case`.
        classes: The classes that were scored; other labels are background.
        image_file: Shown below the labels if it exists and fits.
    """
    labels = sorted({int(label) for which in classes for label in labels_of(which)})
    reference, properties = reader.read_seg(case["reference_file"])
    prediction = _keep(reader.read_seg(case["prediction_file"])[0][0], labels)
    reference = _keep(reference[0], labels)
    image = _read_image(image_file, reader, reference.shape)
    axis = slice_axis(properties["spacing"], reference.shape)
    index = _most_different_slice(reference, prediction, axis)
    slices = [np.take(array, index, axis=axis) for array in (image, reference, prediction)]
    spacing = [size for number, size in enumerate(properties["spacing"]) if number != axis]
    picture = _join(slices, labels, spacing)
    place = f"slice {index + 1} of {reference.shape[axis]}" if reference.shape[axis] > 1 else "whole image"
    return encode_png(picture), place


def _keep(labelled: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    return np.where(np.isin(labelled, labels), labelled, 0).astype(np.int32)


def _read_image(file: str | None, reader: BaseReaderWriter, shape: tuple[int, ...]) -> np.ndarray:
    if file is not None and Path(file).is_file():
        image = reader.read_images([file])[0][0]
        if image.shape == shape:
            low, high = np.percentile(image, (0.5, 99.5))
            return np.clip(image, low, high)
    return np.zeros(shape, dtype=np.float32)


def slice_axis(spacing: Sequence[float], shape: Sequence[int]) -> int:
    """Return the axis along which slices lie.

    It is the one of length 1, or else that with the largest spacing, the first of equals.
    """
    return list(shape).index(1) if 1 in shape else int(np.argmax(np.round(spacing, 3)))


def _most_different_slice(reference: np.ndarray, prediction: np.ndarray, axis: int) -> int:
    others = tuple(other for other in range(reference.ndim) if other != axis)
    differences = np.count_nonzero(reference != prediction, axis=others)
    if not differences.any():
        differences = np.count_nonzero(reference, axis=others)
    return int(np.argmax(differences))


def _join(slices: Sequence[np.ndarray], labels: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    image, reference, prediction = slices
    colours = {0: 0} | {label: 1 + number % (len(color_cycle) - 1) for number, label in enumerate(labels)}
    panels = [generate_overlay(image, labelled, mapping=colours) for labelled in (reference, prediction)]
    panels.append(_mark_differences(image, reference, prediction))
    shape = target_shape(image.shape, spacing)
    gap = np.full((shape[0], _GAP, 3), 255, dtype=np.uint8)
    first, *others = [zoom(panel, shape) for panel in panels]
    return np.concatenate([first, *(part for panel in others for part in (gap, panel))], axis=1)


def _mark_differences(image: np.ndarray, reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    panel = generate_overlay(image, np.zeros_like(reference)) // 2
    panel[(reference > 0) & (reference == prediction)] = 90
    panel[(reference > 0) & (prediction == 0)] = MISSED
    panel[(reference == 0) & (prediction > 0)] = TOO_MUCH
    panel[(reference > 0) & (prediction > 0) & (reference != prediction)] = OTHER_CLASS
    return panel


def target_shape(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int]:
    """Return how many pixels a slice gets: true proportions, small ones enlarged, large ones shrunk."""
    size = np.array(shape) * np.array(spacing, dtype=float)
    rows, columns = np.maximum(1, np.round(size / size.max() * _MAX_SIDE)).astype(int)
    return int(rows), int(columns)


def zoom(panel: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Repeat or leave out pixels, so that the edges of labels stay sharp."""
    rows, columns = ((np.arange(new) * old // new) for new, old in zip(shape, panel.shape))
    return panel[rows][:, columns]


def encode_png(picture: np.ndarray) -> str:
    """Return an uint8 picture `(rows, columns, 3)` as PNG in base64."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
