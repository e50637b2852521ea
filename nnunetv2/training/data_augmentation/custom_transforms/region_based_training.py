"""Turn label maps into one map per region."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform


class ConvertSegmentationToRegionsTransform(AbstractTransform):
    """Replace labels by uint8 maps of regions, 1 inside.

    `(b, c, *spatial)` becomes `(b, regions, *spatial)`.

    Args:
        regions: A label, or a set of labels, per region.
        seg_channel: Where the labels are.
    """

    def __init__(
        self,
        regions: Sequence[int | Sequence[int]],
        seg_key: str = "seg",
        output_key: str = "seg",
        seg_channel: int = 0,
    ) -> None:
        self.regions = regions
        self.seg_key = seg_key
        self.output_key = output_key
        self.seg_channel = seg_channel

    def __call__(self, **data_dict) -> dict:
        labels = data_dict[self.seg_key][:, self.seg_channel]
        in_region = [np.isin(labels, np.atleast_1d(region)) for region in self.regions]
        data_dict[self.output_key] = np.stack(in_region, axis=1).astype(np.uint8)
        return data_dict
