"""Set voxels outside the image's own content to a fixed value."""

from __future__ import annotations

from collections.abc import Sequence

from batchgenerators.transforms.abstract_transforms import AbstractTransform


class MaskTransform(AbstractTransform):
    """Write `set_outside_to` into `data` where a channel of `seg` is negative.

    Both are `(b, c, *spatial)`.
    """

    def __init__(
        self,
        apply_to_channels: Sequence[int],
        mask_idx_in_seg: int = 0,
        set_outside_to: float = 0,
        data_key: str = "data",
        seg_key: str = "seg",
    ) -> None:
        self.apply_to_channels = apply_to_channels
        self.mask_idx_in_seg = mask_idx_in_seg
        self.set_outside_to = set_outside_to
        self.data_key = data_key
        self.seg_key = seg_key

    def __call__(self, **data_dict) -> dict:
        is_outside = data_dict[self.seg_key][:, self.mask_idx_in_seg] < 0
        for channel in self.apply_to_channels:
            data_dict[self.data_key][:, channel][is_outside] = self.set_outside_to
        return data_dict
