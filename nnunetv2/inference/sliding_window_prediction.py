"""Weigh the voxels of a tile on torch's devices.

The rest of the geometry, without torch, is in `tile_geometry`.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from nnunetv2.inference.tile_geometry import Slicer as Slicer
from nnunetv2.inference.tile_geometry import compute_steps_for_sliding_window as compute_steps_for_sliding_window
from nnunetv2.inference.tile_geometry import compute_tile_slicers as compute_tile_slicers
from nnunetv2.inference.tile_geometry import gaussian_bump


@lru_cache(maxsize=2)
def compute_gaussian(
    tile_size: tuple[int, ...],
    sigma_scale: float = 1.0 / 8,
    value_scaling_factor: float = 1,
    dtype: torch.dtype = torch.float16,
    device: torch.device = torch.device("cuda", 0),
) -> torch.Tensor:
    """Return the weights of a tile's voxels: a Gaussian, nowhere 0.

    Args:
        sigma_scale: Standard deviation as a fraction of the tile's side.
        value_scaling_factor: The largest weight.
    """
    bump = gaussian_bump(tile_size, sigma_scale, value_scaling_factor)
    weights = torch.from_numpy(bump).to(device=device, dtype=dtype)
    # A voxel that only the rim of one tile covers is divided by its weight in the end.
    weights[weights == 0] = weights[weights > 0].min()
    return weights
