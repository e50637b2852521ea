"""Rotate and scale image and label patches: the library's transform, with labels interpolated only where they meet."""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from torch import Tensor
from torch.nn.functional import pad

MARGIN = 2  # voxels of padding, so that a cell that lies outside the image altogether exists
SHARE_SCALE = 1000  # as in the library: shares are compared as float16, whose spacing there makes near ties equal


class BoundarySpatialTransform(SpatialTransform):
    """Give the labels that `SpatialTransform` gives, in a time that does not grow with their number.

    The library interpolates the indicator of every label at every voxel. Here a point is looked up where the voxels
    around it agree, and interpolated only where they do not, which is a few percent of a patch. Measured on one core
    for 128³ out of 205³ voxels, image included: 170 ms instead of 470 with 3 labels, 200 instead of 1600 with 20.

    Other settings than linear interpolation and constant padding are left to the library, and so are images.
    """

    def _apply_to_segmentation(self, segmentation: Tensor, **params) -> Tensor:
        is_supported = (
            self.mode_seg == "bilinear"
            and self.border_mode_seg in ("zeros", "constant")
            and getattr(self, "seg_tiebreak", "nearest") == "nearest"
            and not self.align_corners
            and not segmentation.is_floating_point()
        )
        if params["grid"] is None or not is_supported:
            return super()._apply_to_segmentation(segmentation, **params)
        padding_label = self.padding_value_seg if self.border_mode_seg == "constant" else 0
        return resample_labels(segmentation, params["grid"], padding_label)


def resample_labels(segmentation: Tensor, grid: Tensor, padding_label: int) -> Tensor:
    """Sample label maps at points between voxels.

    A point gets the label with the largest share in a linear interpolation; of several with the same share the one of
    the nearest voxel if it is among them, else the lowest. Outside the image lies `padding_label`.

    Args:
        segmentation: `(c, *spatial)`.
        grid: `(*patch, dim)`, points as `torch.nn.functional.grid_sample` takes them with `align_corners=False`.

    Returns:
        `(c, *patch)` in the dtype of `segmentation`.
    """
    shape = segmentation.shape[1:]
    padded = pad(segmentation, [MARGIN] * (2 * len(shape)), value=padding_label)
    cells = _find_cells(grid, shape)
    resampled = torch.empty((len(segmentation), *grid.shape[:-1]), dtype=segmentation.dtype)
    for labels, result in zip(padded, resampled):
        torch.take(labels, cells, out=result)
        is_mixed = torch.take(_find_mixed_cells(labels), cells)
        result[is_mixed] = _choose_labels(labels, cells[is_mixed], grid[is_mixed], shape)
    return resampled


def _positions(grid: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Return the points' coordinates along an axis in voxels. `grid_sample` counts axes from the last one."""
    return grid[..., len(shape) - 1 - axis].add(1).mul_(shape[axis]).sub_(1).div_(2)


def _find_cells(grid: Tensor, shape: Sequence[int]) -> Tensor:
    """Return for each point the flat index, in the padded image, of the voxel at the lower corner of its cell.

    A cell is spanned by the 2 voxels per axis that a linear interpolation draws on.
    """
    cells = torch.zeros(grid.shape[:-1], dtype=torch.long)
    for axis, length in enumerate(shape):
        lower = _positions(grid, shape, axis).floor_().clamp_(-MARGIN, length).add_(MARGIN)
        cells.mul_(length + 2 * MARGIN).add_(lower.long())
    return cells


def _find_mixed_cells(labels: Tensor) -> Tensor:
    """Mark the cells, named by their lower corner, whose voxels do not all have one label."""
    mixed = torch.zeros(labels.shape, dtype=torch.bool)
    for axis, length in enumerate(labels.shape):
        # Two cells of the axes before, side by side on this axis: each of one label, and of the same one?
        lower, upper = (labels.narrow(axis, start, length - 1) for start in (0, 1))
        change = lower != upper
        change |= mixed.narrow(axis, 1, length - 1)
        mixed.narrow(axis, 0, length - 1).logical_or_(change)
    return mixed


def _choose_labels(labels: Tensor, cells: Tensor, grid: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the label with the largest share at each of `n` points, given with their cells, in a padded image."""
    positions = [_positions(grid, shape, axis) for axis in range(len(shape))]
    lower = [position.floor() for position in positions]
    steps = [math.prod(labels.shape[axis + 1:]) for axis in range(len(shape))]
    corners = torch.empty((2 ** len(shape), len(cells)), dtype=labels.dtype)
    weights = torch.ones(corners.shape)
    for number, is_upper in enumerate(itertools.product((False, True), repeat=len(shape))):
        torch.take(labels, cells + sum(itertools.compress(steps, is_upper)), out=corners[number])
        for axis, upper in enumerate(is_upper):
            weights[number] *= positions[axis] - lower[axis] if upper else lower[axis] + 1 - positions[axis]
    shares = torch.stack([((corners == corner) * weights).sum(0) for corner in corners])
    shares = (shares * SHARE_SCALE).to(torch.float16)
    largest = shares.amax(0)
    lowest_winner = corners.masked_fill(shares < largest, torch.iinfo(corners.dtype).max).amin(0)
    nearest = torch.zeros(len(cells), dtype=torch.long)
    for position, below in zip(positions, lower):
        nearest.mul_(2).add_((position.round() - below).long())
    nearest = nearest[None]
    return torch.where(shares.gather(0, nearest)[0] == largest, corners.gather(0, nearest)[0], lowest_winner)
