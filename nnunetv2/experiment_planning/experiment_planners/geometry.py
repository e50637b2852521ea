"""Turn spacings and shapes into target spacing, axis order and initial patch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunetv2.experiment_planning.experiment_planners.case_geometry import CaseGeometry

# Volume of the patch that shrinking starts from, in voxels of isotropic images; key: number of dimensions.
INITIAL_PATCH_VOLUME = {2: 2048**2, 3: 256**3}
LOWRES_STEP = 1.03


def median_target_spacing(geometry: CaseGeometry, anisotropy_threshold: float) -> np.ndarray:
    """Return the median spacing per axis.

    A finer one across the slices of clearly anisotropic data.

    Where both the median spacing of the coarsest axis is more than `anisotropy_threshold` times that of any other, and
    its median shape less than the others' by that factor, the 10th percentile of its spacings is taken instead, kept
    just above the largest other spacing.
    """
    # Not np.median, which rounds differently in the last digit when the number of cases is even.
    target = geometry.spacing_percentile(50)
    median_shape = geometry.median_shape()  # of whole numbers, so that their percentile 50 is the same
    worst = int(np.argmax(target))
    others = [axis for axis in range(len(target)) if axis != worst]
    coarsest_other = max(target[others])
    has_thick_slices = target[worst] > anisotropy_threshold * coarsest_other
    has_few_slices = median_shape[worst] * anisotropy_threshold < min(median_shape[others])
    if has_thick_slices and has_few_slices:
        finer = geometry.spacing_percentile(10)[worst]
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


def median_resampled_shape(geometry: CaseGeometry, target: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the median shape per axis once each case has the target spacing.

    May be a half, but is never 0.
    """
    median = geometry.median_resampled_shape(target)
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
