"""Read a training case for the fingerprint: geometry, and a sample of the foreground's intensities.

A case is sampled with replacement, often far more draws than it has foreground voxels. So a sample is held as the
values that were drawn and how often each was, never as the list of draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nnunetv2.preprocessing.finite_values import require_finite

WeightedValues = tuple[np.ndarray, np.ndarray]
"""Values (float32) and how often each was drawn (int64)."""

SEED = 1234
# Draws per call of the generator. It bounds memory; the stream is the same however it is cut.
DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CaseSample:
    """The contribution of one case to the fingerprint.

    Shapes and spacings are in array order, not transposed.
    """

    shape_after_crop: tuple
    """Voxels per axis of the non-zero region."""
    spacing: tuple
    """Millimetres per axis, as the reader gave them."""
    relative_size: float
    """Voxels after cropping divided by voxels before."""
    intensities: list[WeightedValues]
    """Per channel the foreground values that were drawn (float32, ascending, distinct) and how often each was
    (int64, at least 1). Both are empty if the case has no foreground."""

    @property
    def has_foreground(self) -> bool:
        return any(len(values) for values, _ in self.intensities)


def sample_case(
    image_files: Sequence[str],
    segmentation_file: str,
    reader_writer_class: type,
    num_samples: int,
    num_channels: int | None = None,
) -> CaseSample:
    """Read, check and crop a case and draw `num_samples` foreground intensities of each channel.

    Args:
        num_channels: The number by dataset.json, checked if given.

    Raises:
        ValueError: Shapes of image and label differ, the number of channels is unexpected, or values are not
            finite.
    """
    images, segmentation, spacing, relative_size = read_cropped_case(
        image_files, segmentation_file, reader_writer_class
    )
    if num_channels is not None and len(images) != num_channels:
        raise ValueError(f"the image has {len(images)} channel(s), dataset.json names {num_channels}")
    require_finite(images)
    require_finite(segmentation, "label")
    intensities = draw_foreground(segmentation, images, num_samples=num_samples)
    return CaseSample(tuple(images.shape[1:]), tuple(map(_as_number, spacing)), relative_size, intensities)


def read_cropped_case(
    image_files: Sequence[str], segmentation_file: str, reader_writer_class: type
) -> tuple[np.ndarray, np.ndarray, Sequence[float], float]:
    """Read image and label and crop both to the non-zero region of the image.

    Returns:
        Images `(C, Z, Y, X)`, label `(1, Z, Y, X)`, spacing per axis in mm, and voxels after / voxels before cropping.
    """
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    reader = reader_writer_class()
    images, properties = reader.read_images(image_files)
    segmentation, _ = reader.read_seg(segmentation_file)
    if images.shape[1:] != segmentation.shape[1:]:
        raise ValueError(
            f"the label has shape {segmentation.shape[1:]}, the image {images.shape[1:]}; they must be "
            f"equal. Label: {segmentation_file}, image: {image_files[0]}"
        )
    cropped, cropped_segmentation, _ = crop_to_nonzero(images, segmentation)
    relative_size = float(np.prod(cropped.shape[1:]) / np.prod(images.shape[1:]))
    return cropped, cropped_segmentation, properties["spacing"], relative_size


def draw_foreground(
    segmentation: np.ndarray, images: np.ndarray, *, num_samples: int, seed: int = SEED
) -> list[WeightedValues]:
    """Draw foreground voxels of each channel with replacement; return distinct values and their counts.

    Foreground is every voxel with a label above 0, the ignore label included. One generator serves all channels
    of the case in turn.
    """
    generator = np.random.RandomState(seed)
    foreground = segmentation[0] > 0
    return [_draw(image[foreground].astype(np.float32, copy=False), num_samples, generator) for image in images]


def _draw(values: np.ndarray, num_samples: int, generator: np.random.RandomState) -> WeightedValues:
    if not len(values):
        return values, np.zeros(0, dtype=np.int64)
    counts = np.zeros(len(values), dtype=np.int64)
    # A block is never smaller than the histogram, so that filling it costs no more than drawing.
    for size in _blocks(num_samples, max(DRAWS_AT_ONCE, len(values))):
        counts += np.bincount(generator.randint(0, len(values), size), minlength=len(values))
    return merge_equal_values(values, counts)


def _blocks(total: int, at_most: int) -> Iterator[int]:
    for start in range(0, total, at_most):
        yield min(at_most, total - start)


def merge_equal_values(values: np.ndarray, counts: np.ndarray) -> WeightedValues:
    """Return ascending distinct values with the sums of their counts, without those never drawn."""
    drawn = counts > 0
    distinct, position = np.unique(values[drawn], return_inverse=True)
    return distinct, np.bincount(position.ravel(), weights=counts[drawn], minlength=len(distinct)).astype(np.int64)


def _as_number(value: float) -> float:
    """Turn a numpy scalar into the Python number that JSON can hold, and leave int apart from float."""
    return value.item() if isinstance(value, np.generic) else value
