"""Point out images whose size hardly suits a model.

Headers in wrong units, pictures for 3D models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from nnunetv2.errors import InvalidInputError
from nnunetv2.preprocessing.resampling.default_resampling import round_lengths
from nnunetv2.utilities.free_memory import total_memory_bytes

if TYPE_CHECKING:
    from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager

logger = logging.getLogger(__name__)

# Readers give 2D images a spacing across the picture that is 999 times the one within it.
_MARKS_A_PICTURE = 900
_BYTES_PER_VOXEL = 4


def require_memory(
    num_channels: int,
    old_shape: Sequence[int],
    new_shape: Sequence[int],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> None:
    """Check that an image fits into the machine's memory once it is resampled.

    Raises:
        InvalidInputError: It is larger than all of it.
    """
    num_bytes, total = num_channels * prod(map(int, new_shape)) * _BYTES_PER_VOXEL, total_memory_bytes()
    if total is not None and num_bytes > total:
        raise InvalidInputError(
            f"{describe_grids(old_shape, new_shape, spacing, new_spacing)}, which takes "
            f"{num_bytes / 1e9:,.0f} GB, more than this machine's {total / 1e9:,.0f} GB. Is the "
            "spacing in the image's header right, and in mm?"
        )


def describe_grids(
    old_shape: Sequence[int], new_shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> str:
    """Describe the effect of resampling on the grid of an image."""
    return (
        f"{_by(old_shape)} voxels with spacing {_by(spacing)} mm become {_by(new_shape)} voxels at the plans' "
        f"spacing {_by(new_spacing)} mm"
    )


def warn_of_odd_size(
    name: str, properties: Mapping[str, Any], plans_manager: PlansManager, configuration_manager: ConfigurationManager
) -> None:
    """Warn of a preprocessed image with hardly a voxel left.

    Or of a picture where volumes are expected.

    Args:
        name: How messages call the image.
        properties: As preprocessing leaves them.
    """
    keys = ("spacing", "shape_before_cropping", "shape_after_cropping_and_before_resampling")
    if any(key not in properties for key in keys) or len(properties["spacing"]) != 3:
        return  # a preprocessor of a user's own
    wanted = [float(entry) for entry in configuration_manager.spacing]
    spacing = [float(properties["spacing"][axis]) for axis in plans_manager.transpose_forward]
    wanted = [*spacing[: 3 - len(wanted)], *wanted]
    shape = properties["shape_after_cropping_and_before_resampling"]
    new_shape = round_lengths(shape, spacing, wanted)
    if 0 in new_shape:
        kept = [max(1, length) for length in new_shape]
        logger.warning(
            "%s: %s, where one voxel is kept along an axis that is shorter than half of one. Is its spacing right?",
            name,
            describe_grids(shape, kept, spacing, wanted),
        )
    elif len(configuration_manager.spacing) == 3 and _is_picture(properties["shape_before_cropping"], spacing):
        logger.warning(
            "%s is a 2D image, but the model is 3D: %s. Use a 2d configuration",
            name,
            describe_grids(shape, new_shape, spacing, wanted),
        )


def _is_picture(shape: Sequence[int], spacing: Sequence[float]) -> bool:
    axis = max(range(3), key=lambda a: spacing[a])
    others = [spacing[a] for a in range(3) if a != axis]
    return shape[axis] == 1 and spacing[axis] > _MARKS_A_PICTURE * max(others)


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
