"""Turn spacings and shapes into target spacing, axis order and initial patch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunetv2.preprocessing.resampling.default_resampling import round_lengths

# Volume of the patch that shrinking starts from, in voxels of isotropic images; key: number of dimensions.
INITIAL_PATCH_VOLUME = {2: 2048**2, 3: 256**3}
LOWRES_STEP = 1.03


def median_target_spacing(spacings: np.ndarray, shapes: np.ndarray, anisotropy_threshold: float) -> np.ndarray:
    """Return the median spacing per axis.

    A finer one across the slices of clearly anisotropic data.

    Where both the median spacing of the coarsest axis is more than `anisotropy_threshold` times that of any other, and
    its median shape less than the others' by that factor, the 10th percentile of its spacings is taken instead, kept
    just above the largest other spacing.

    Args:
        spacings: `(cases, axes)`, mm.
        shapes: `(cases, axes)`, voxels after cropping.
    """
    # Not np.median, which rounds differently in the last digit when the number of cases is even.
    target = np.percentile(spacings, 50, axis=0)
    median_shape = np.percentile(shapes, 50, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(len(target)) if axis != worst]
    coarsest_other = max(target[others])
    has_thick_slices = target[worst] > anisotropy_threshold * coarsest_other
    has_few_slices = median_shape[worst] * anisotropy_threshold < min(median_shape[others])
    if has_thick_slices and has_few_slices:
        finer = np.percentile(spacings[:, worst], 10)
        # Must stay the coarsest axis, or the axis order would flip.
        target[worst] = finer if finer >= coarsest_other else coarsest_other + 1e-5
    return target


def coarsest_axis_first(spacing: Sequence[float] | np.ndarray) -> tuple[list[int], list[int]]:
    """Return the permutation that moves the coarsest axis to the front.

    And its inverse.
    """
    coarsest = int(np.argmax(spacing))
    forward = [coarsest, *(axis for axis in range(len(spacing)) if axis != coarsest)]
    return forward, [forward.index(axis) for axis in range(len(forward))]


def median_resampled_shape(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], target: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Return the median shape per axis once each case has the target spacing.

    May be a half, but is never 0.
    """
    # Without the one voxel that preprocessing keeps of a thin case: plans are those of the release.
    median = np.median([round_lengths(shape, spacing, target) for spacing, shape in zip(spacings, shapes)], axis=0)
    return np.where(median == 0, 1.0, median)


def initial_patch_size(spacing: Sequence[float] | np.ndarray, median_shape: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return a large patch that is cubic in mm.

    It is cut to the median shape, whose halves it may keep.
    """
    inverse = 1 / np.asarray(spacing, dtype=float)
    dim = len(inverse)
    scale = (INITIAL_PATCH_VOLUME[dim] / np.prod(inverse)) ** (1 / dim)
    return np.array([min(round(edge), limit) for edge, limit in zip(inverse * scale, median_shape)])


def coarsen(spacing: np.ndarray) -> np.ndarray:
    """Take one step towards a lower resolution.

    Of the fine axes alone as long as they are less than half the coarsest, then of all.
    """
    lagging = spacing.max() / spacing > 2
    return np.where(lagging | ~lagging.any(), spacing * LOWRES_STEP, spacing)
