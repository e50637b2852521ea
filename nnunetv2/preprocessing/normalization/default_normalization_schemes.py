"""Bring the intensities of an image channel to a scale that networks train well on."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from nnunetv2.errors import InvalidInputError


class ImageNormalization(ABC):
    """One way to normalize a channel. Plans name subclasses, also users' own in this folder.

    Args:
        use_mask_for_norm: Compute statistics, and change voxels, inside the non-zero mask only.
        intensityproperties: Foreground statistics of this channel over the training cases (keys `mean`, `std`,
            `percentile_00_5`, `percentile_99_5`).
        target_dtype: Of the result and of the arithmetic.
    """

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true: bool = False

    def __init__(
        self,
        use_mask_for_norm: bool | None = None,
        intensityproperties: dict | None = None,
        target_dtype: type[np.number] = np.float32,
    ):
        if not (use_mask_for_norm is None or isinstance(use_mask_for_norm, (bool, np.bool_))):
            raise InvalidInputError(f"use_mask_for_norm must be true, false or absent, got {use_mask_for_norm!r}")
        if not (intensityproperties is None or isinstance(intensityproperties, dict)):
            raise InvalidInputError(f"intensityproperties must be a dict, got {type(intensityproperties).__name__}")
        self.use_mask_for_norm = use_mask_for_norm
        self.intensityproperties = {} if intensityproperties is None else intensityproperties
        self.target_dtype = target_dtype

    @abstractmethod
    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Normalize one channel.

        Args:
            image: `(x, y, z)`. Overwritten and returned where its dtype is `target_dtype` already.
            seg: `(x, y, z)`, below 0 outside the non-zero mask.
        """

    def _cast(self, image: np.ndarray) -> np.ndarray:
        return image.astype(self.target_dtype, copy=False)

    @property
    def _smallest_divisor(self) -> float:
        return 1e-4 if np.dtype(self.target_dtype) == np.float16 else 1e-8


class ZScoreNormalization(ImageNormalization):
    """Subtract the mean of the image and divide by its standard deviation."""

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = True

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Normalize over all voxels, or over those where `seg >= 0` with `use_mask_for_norm`."""
        image = self._cast(image)
        if not self.use_mask_for_norm:
            return self._standardize_(image)
        if seg is None:
            raise InvalidInputError("normalization within the non-zero mask needs the segmentation that holds it")
        inside = seg >= 0
        if inside.any():
            image[inside] = self._standardize_(image[inside])
        return image

    def _standardize_(self, values: np.ndarray) -> np.ndarray:
        mean, std = values.mean(), values.std()
        values -= mean
        values /= max(std, self._smallest_divisor)
        return values


class CTNormalization(ImageNormalization):
    """Clip to the usual range of the foreground, then standardize.

    Range and statistics are those of all training cases.

    Intensities of CT are physical, so one scale serves all cases.
    """

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Normalize with `intensityproperties`."""
        missing = {"mean", "std", "percentile_00_5", "percentile_99_5"} - self.intensityproperties.keys()
        if missing:
            raise InvalidInputError(
                f"CTNormalization needs the intensity properties {sorted(missing)} of the plans, "
                "which are missing for this channel"
            )
        image = self._cast(image)
        properties = self.intensityproperties
        np.clip(image, properties["percentile_00_5"], properties["percentile_99_5"], out=image)
        image -= properties["mean"]
        image /= max(properties["std"], self._smallest_divisor)
        return image


class NoNormalization(ImageNormalization):
    """Leave intensities as they are."""

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Cast only."""
        return self._cast(image)


class RescaleTo01Normalization(ImageNormalization):
    """Map the smallest value of the image to 0 and the largest to 1."""

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Rescale; an image of one value becomes 0."""
        image = self._cast(image)
        image -= image.min()
        image /= max(image.max(), self._smallest_divisor)
        return image


class RGBTo01Normalization(ImageNormalization):
    """Map 0 to 255 to 0 to 1."""

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """Divide by 255, after a check that the values are those of 8-bit images."""
        lowest, highest = image.min(), image.max()
        if lowest < 0 or highest > 255:
            raise InvalidInputError(
                f"RGB images must have values between 0 and 255, got {lowest} to {highest}; "
                "another channel name in dataset.json chooses another normalization"
            )
        image = self._cast(image)
        image /= 255.0
        return image
