"""Compare where two files of a case lie in space.

The network does not see it, but a viewer does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2.experiment_planning.integrity.findings import enumerate_some

MATERIAL_VOXELS = 0.5
"""Files that are apart by more than this many voxels somewhere do not show the same thing. Less is rounding."""


@dataclass(frozen=True)
class Geometry:
    """Where voxels lie.

    Axes are those of the file's format (the reverse of the array's), lengths in mm.
    """

    origin: tuple[float, ...]
    direction: tuple[tuple[float, ...], ...]
    """One row per axis of space, one column per axis of the file, each of length 1."""
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Displacement:
    """The difference between two geometries, and its largest distance."""

    what: str
    found: str
    expected: str
    millimetres: float
    is_material: bool


def get_geometry(properties: Mapping[str, Any]) -> Geometry | None:
    """Return the geometry that a reader has noted.

    It is that of the arrays, after any reorientation.
    """
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        if not {"spacing", "origin", "direction"} <= set(stuff):
            return None
        dim = len(stuff["origin"])
        direction = np.reshape(stuff["direction"], (dim, dim))[:3, :3]
        return _freeze(stuff["origin"][:3], direction, stuff["spacing"][:3])
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=float)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if not spacing.all():
            return None
        return _freeze(affine[:3, 3], affine[:3, :3] / spacing, spacing)
    return None


def find_displacement(first: Geometry | None, other: Geometry | None, shape: Sequence[int]) -> Displacement | None:
    """Return how `other` lies apart from `first`.

    None if both are numerically equal or one is unknown.

    Args:
        first: Of the image.
        other: Of the label, or of another image of the case.
        shape: Voxels per array axis, of both.
    """
    if first is None or other is None or len(first.origin) != len(other.origin):
        return None
    same_origin = np.allclose(first.origin, other.origin)
    if same_origin and np.allclose(first.direction, other.direction):
        return None
    sizes = list(shape)[::-1][: len(first.origin)]
    corners = np.array(list(itertools.product(*((0, size - 1) for size in sizes))), dtype=float)
    distance = float(np.linalg.norm(_place(other, corners) - _place(first, corners), axis=1).max())
    name = "direction" if not np.allclose(first.direction, other.direction) else "origin"
    return Displacement(
        name,
        _show(getattr(other, name)),
        _show(getattr(first, name)),
        distance,
        distance > MATERIAL_VOXELS * min(first.spacing),
    )


def _place(geometry: Geometry, voxels: np.ndarray) -> np.ndarray:
    """Return the positions in mm of voxels `(n, axes of the file)`."""
    return voxels * geometry.spacing @ np.transpose(geometry.direction) + geometry.origin


def _freeze(origin: Sequence[float] | np.ndarray, direction: np.ndarray, spacing: Sequence[float]) -> Geometry:
    return Geometry(
        tuple(map(float, origin)), tuple(tuple(map(float, row)) for row in direction), tuple(map(float, spacing))
    )


def _show(values: Any) -> str:
    return enumerate_some((round(float(value), 4) + 0.0 for value in np.ravel(values)), 9)
