"""Colour the labels of a slice over a grey or colour picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

color_cycle = (
    "000000",
    "4363d8",
    "f58231",
    "3cb44b",
    "e6194B",
    "911eb4",
    "ffe119",
    "bfef45",
    "42d4f4",
    "f032e6",
    "000075",
    "9A6324",
    "808000",
    "800000",
    "469990",
)
"""RGB colours as hexadecimal digits. The first one, black, is background's and changes nothing."""


def hex_to_rgb(hex: str) -> tuple[int, int, int]:
    """Return red, green and blue of a colour in six hexadecimal digits.

    With or without #.

    Raises:
        ValueError: The text is no such colour.
    """
    digits = hex.removeprefix("#")
    if len(digits) != 6:
        raise ValueError(f"{hex!r} is no colour: expected six hexadecimal digits such as 4363d8")
    red, green, blue = (int(digits[start : start + 2], 16) for start in (0, 2, 4))
    return red, green, blue


def generate_overlay(
    input_image: np.ndarray,
    segmentation: np.ndarray,
    mapping: Mapping[int, int] | None = None,
    color_cycle: Sequence[str] = color_cycle,
    overlay_intensity: float = 0.6,
) -> np.ndarray:
    """Return a picture of a slice with its labels in colour, uint8 `(x, y, 3)`.

    Args:
        input_image: Grey `(x, y)` or `(x, y, 1)`. Values that are no numbers are shown as the smallest one.
        segmentation: Label map `(x, y)`.
        mapping: Label -> number of its colour. Default: labels that occur are numbered in their order, background 0.
        color_cycle: The colours. With more labels than colours they repeat, but for the first one.
        overlay_intensity: How strongly labels cover the image, from 0 on.

    Raises:
        RuntimeError: The image has other axes.
        ValueError: Shapes differ.
    """
    grey = _as_grey(input_image)
    if grey.shape != segmentation.shape:
        raise ValueError(f"the image has shape {grey.shape}, the label map {segmentation.shape}")
    labels = np.unique(segmentation)
    if mapping is None:
        # without background, the first label would be numbered 0 and stay black
        first = 0 if labels.size and labels[0] <= 0 else 1
        mapping = {label: number for number, label in enumerate(labels, start=first)}
    picture = np.repeat(_stretch(grey)[..., None], 3, axis=2)
    for label in labels:
        if label in mapping:
            colour = _colour(mapping[label], color_cycle)
            picture[segmentation == label] += overlay_intensity * np.array(colour, dtype=np.float32)
    highest = picture.max(initial=0)
    return (picture / highest * 255 if highest > 0 else picture).astype(np.uint8)


def _as_grey(image: np.ndarray) -> np.ndarray:
    if image.ndim == 3 and image.shape[-1] == 1:
        return image[..., 0]
    if image.ndim != 2:
        raise RuntimeError(f"expected an image of two axes (or a third one of length 1), got shape {image.shape}")
    return image


def _stretch(grey: np.ndarray) -> np.ndarray:
    """Return the image as float32 from 0 to 255; a constant one is black."""
    values = grey.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros_like(values)
    lowest = values[finite].min()
    values = np.where(finite, values - lowest, 0)
    highest = values.max()
    return values / highest * 255 if highest > 0 else values


def _colour(number: int, colours: Sequence[str]) -> tuple[int, int, int]:
    number = int(number)
    if number >= len(colours):
        number = 1 + (number - 1) % (len(colours) - 1)
    return hex_to_rgb(colours[number])
