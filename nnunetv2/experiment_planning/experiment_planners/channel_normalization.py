"""Choose how the channels of a dataset are normalised."""

from __future__ import annotations

from collections.abc import Iterable

MASK_NORM_BELOW = 0.75
"""Below this share of voxels after cropping, statistics of the whole image would describe its empty border."""


def choose_normalization(channel_names: Iterable[str], relative_size_after_cropping: float) -> list[tuple[str, bool]]:
    """Return per channel its normalization, and whether that leaves the border at 0."""
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    is_mostly_border = relative_size_after_cropping < MASK_NORM_BELOW
    schemes = [get_normalization_scheme(name) for name in channel_names]
    return [
        (scheme.__name__, is_mostly_border and scheme.leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true)
        for scheme in schemes
    ]
