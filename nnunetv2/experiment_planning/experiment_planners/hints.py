"""Point out plans that are of little use because of their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def describe_too_small(configuration_name: str, median_shape: Sequence[float]) -> str:
    """Explain why a single-stage network cannot be trained, with a remedy."""
    return (
        f"{configuration_name} cannot be trained: its images are too small, {_by(median_shape)} voxels in the "
        "median, for a network of more than one stage. An axis needs at least 8 voxels. Pad or resample the "
        "images, or plan with a finer spacing (-overwrite_target_spacing)"
    )


def find_too_small(configurations: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the planned configurations that cannot be trained, each with the reason."""
    return {
        name: describe_too_small(name, configuration["median_image_size_in_voxels"])
        for name, configuration in configurations.items()
        if len(configuration.get("architecture", {}).get("arch_kwargs", {}).get("strides", ())) == 1
    }


def describe_flat_axes(median_shape: Sequence[float] | np.ndarray, transpose_forward: Sequence[int]) -> str | None:
    """Return a hint if slices are made of an axis with one voxel.

    Otherwise None.

    Args:
        median_shape: Transposed; the first axis is that across slices.
    """
    flat = [transpose_forward[axis] for axis, length in enumerate(median_shape) if axis and length == 1]
    if not flat:
        return None
    shape = [median_shape[list(transpose_forward).index(axis)] for axis in range(len(median_shape))]
    return (
        f"the median image, {_by(shape)} voxels in the order of arrays, has a single voxel along axis "
        f"{' and '.join(map(str, sorted(flat)))}. If these are 2D images, store them as 2D files, or so that this "
        "axis is the first of the array (the last of a NIfTI file); as they are, networks see lines"
    )


def _by(shape: Sequence[float]) -> str:
    return " x ".join(f"{length:g}" for length in shape)
