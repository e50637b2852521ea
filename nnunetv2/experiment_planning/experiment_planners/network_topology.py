"""Turn a patch size and a spacing into strides and kernels.

That is, how deep a U-Net goes along each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Topology(NamedTuple):
    """The shape of a U-Net.

    Number of stages = number of strides; strides and kernels have one entry per axis.
    """

    num_pool_per_axis: list[int]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]
    """The patch, padded so that every axis can be halved as often as `num_pool_per_axis` says."""
    must_be_divisible_by: np.ndarray


def get_shape_must_be_divisible_by(net_numpool_per_axis: Sequence[int]) -> np.ndarray:
    """Return 2 to the power of the number of halvings, per axis."""
    return 2 ** np.asarray(net_numpool_per_axis)


def pad_shape(shape: Sequence[float], must_be_divisible_by: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the smallest multiples of `must_be_divisible_by` that are not below `shape`, as ints.

    Args:
        shape: May be fractional, as a median of shapes is.
        must_be_divisible_by: One number per axis, or one for all axes.
    """
    divisor = np.broadcast_to(must_be_divisible_by, len(shape))
    return (np.ceil(np.asarray(shape) / divisor) * divisor).astype(int)


def get_pool_and_conv_props(
    spacing: Sequence[float] | np.ndarray,
    patch_size: Sequence[float] | np.ndarray,
    min_feature_map_size: int,
    max_numpool: int,
) -> Topology:
    """Halve the feature maps until they are small, the finest axes first.

    An axis is halved while its voxels are less than twice as large as the smallest among the axes that still can be
    halved. Its kernel is 3 from the stage on at which its voxels are less than twice the smallest of all, 1 before
    that: across thick slices a kernel would mix distant voxels.

    Args:
        spacing: Per axis.
        patch_size: Per axis, may be fractional.
        min_feature_map_size: No axis becomes shorter than this.
        max_numpool: No axis is halved more often than this.
    """
    dim = len(spacing)
    spacing, size = [float(s) for s in spacing], [float(s) for s in patch_size]
    num_pool, kernel = [0] * dim, (1,) * dim
    strides, kernel_sizes = [(1,) * dim], []
    while axes := _axes_to_halve(spacing, size, num_pool, min_feature_map_size, max_numpool):
        finest = min(spacing)
        kernel = tuple(3 if k == 3 or s / finest < 2 else 1 for k, s in zip(kernel, spacing))
        kernel_sizes.append(kernel)
        strides.append(tuple(2 if axis in axes else 1 for axis in range(dim)))
        for axis in axes:
            num_pool[axis] += 1
            spacing[axis] *= 2
            size[axis] = float(np.ceil(size[axis] / 2))
    kernel_sizes.append((3,) * dim)  # at the bottom all axes are mixed
    divisor = get_shape_must_be_divisible_by(num_pool)
    padded = tuple(pad_shape(patch_size, divisor).tolist())
    return Topology(num_pool, tuple(strides), tuple(kernel_sizes), padded, divisor)


def _axes_to_halve(
    spacing: list[float], size: list[float], num_pool: list[int], min_size: int, max_numpool: int
) -> list[int]:
    """Return the axes that the next stage halves; none means that the network is deep enough."""
    axes = [axis for axis, length in enumerate(size) if length >= 2 * min_size]
    if not axes:
        return []
    finest = min(spacing[axis] for axis in axes)
    axes = [axis for axis in axes if spacing[axis] / finest < 2 and num_pool[axis] < max_numpool]
    # A last axis on its own is halved only if that leaves more than the bare minimum.
    if len(axes) == 1 and size[axes[0]] < 3 * min_size:
        return []
    return axes
