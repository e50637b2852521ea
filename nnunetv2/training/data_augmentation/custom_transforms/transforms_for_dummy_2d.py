"""Pass the slices of volumes through 2D transforms as channels, and back."""

from __future__ import annotations

from collections.abc import Sequence

from batchgenerators.transforms.abstract_transforms import AbstractTransform

REMEMBERED_SHAPE = "orig_shape_{}"


class Convert3DTo2DTransform(AbstractTransform):
    """Turn `(b, c, x, y, z)` into `(b, c * x, y, z)`.

    The old shape is kept under `orig_shape_<key>`.
    """

    def __init__(self, apply_to_keys: Sequence[str] = ("data", "seg")) -> None:
        self.apply_to_keys = apply_to_keys

    def __call__(self, **data_dict) -> dict:
        for key in self.apply_to_keys:
            batch, channels, slices, *plane = data_dict[key].shape
            data_dict[REMEMBERED_SHAPE.format(key)] = data_dict[key].shape
            data_dict[key] = data_dict[key].reshape(batch, channels * slices, *plane)
        return data_dict


class Convert2DTo3DTransform(AbstractTransform):
    """Undo `Convert3DTo2DTransform`; the plane may have got another size in between."""

    def __init__(self, apply_to_keys: Sequence[str] = ("data", "seg")) -> None:
        self.apply_to_keys = apply_to_keys

    def __call__(self, **data_dict) -> dict:
        for key in self.apply_to_keys:
            batch, channels, slices = data_dict[REMEMBERED_SHAPE.format(key)][:3]
            data_dict[key] = data_dict[key].reshape(batch, channels, slices, *data_dict[key].shape[2:])
        return data_dict
