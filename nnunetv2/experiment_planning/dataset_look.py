"""Describe the cases of a raw dataset: sizes, intensities, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (0.5, 25, 50, 75, 99.5)


@dataclass(frozen=True)
class CaseLook:
    """The view of one case in the picture.

    Axes in array order.
    """

    case: str
    intensities: np.ndarray
    """`(channels, len(PERCENTILES))`: percentiles of foreground voxels, of all that are not 0 without foreground."""
    label_voxels: Mapping[int, int]
    """Label -> voxels."""
    voxel_mm3: float


@dataclass(frozen=True)
class DatasetOverview:
    """The view of a dataset in the picture."""

    dataset_name: str
    num_cases: int
    shapes: np.ndarray
    """`(cases, axes)`, voxels after cropping to the nonzero region."""
    spacings: np.ndarray
    """`(cases, axes)`, mm."""
    channel_names: Sequence[str]
    labels: Mapping[str, Sequence[int]]
    """Name -> its values, several for a region; without the background."""
    looks: Sequence[CaseLook]
    """Of all cases, or of `MAX_CASES` of them."""

    @property
    def is_2d(self) -> bool:
        return bool((self.shapes[:, 0] == 1).all())

    def label_sizes(self, name: str) -> np.ndarray:
        """Return the size of a label in all cases looked at.

        In ml, or pixels of 2-D images.
        """
        return np.array(
            [
                sum(look.label_voxels.get(value, 0) for value in self.labels[name])
                * (1 if self.is_2d else look.voxel_mm3 / 1000)
                for look in self.looks
            ]
        )
