"""Compare the surfaces of two masks, in millimetres: HD95, ASSD and surface Dice.

A mask's surface is that of marching cubes (scikit-image) through the midpoints between voxels. The part of it inside a
cube of 2x2x2 voxels is one element: its place is its centre of gravity, its weight its area. So small voxels do not
count more than large ones, and flat and slanted parts count by their size. In 2D, elements lie in squares of 2x2 pixels
and weights are lengths. Distances between elements come from a k-d tree (SciPy).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

METRICS = ("HD95", "ASSD", "SurfaceDice")


@dataclass(frozen=True)
class Surface:
    """Elements of a surface.

    Their places `(n, axes)` in mm and their areas in mm^2 (in 2D lengths in mm).
    """

    places: np.ndarray
    areas: np.ndarray


def compute_surface_metrics(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """Compare two masks of equal shape, 2D or 3D.

    Args:
        spacing_mm: Size of a voxel along each axis.
        tolerance_mm: Parts of a surface closer than this to the other one agree in the surface Dice.

    Returns:
        HD95: the 95th percentile of the distances from one surface to the other, the larger one of both directions.
        ASSD: the mean distance, over both surfaces together. SurfaceDice: the share of both surfaces within tolerance.
        All are NaN if both masks are empty. If one is empty there is no distance, HD95 and ASSD are NaN, and the
        surface Dice is 0.
    """
    if not reference.any() or not prediction.any():
        dice = 0.0 if reference.any() or prediction.any() else math.nan
        return {"HD95": math.nan, "ASSD": math.nan, "SurfaceDice": dice}
    surfaces = find_surface(reference, spacing_mm), find_surface(prediction, spacing_mm)
    areas = [surface.areas for surface in surfaces]
    distances = _distances(*surfaces), _distances(*surfaces[::-1])
    total = sum(area.sum() for area in areas)
    close = sum(area[distance <= tolerance_mm].sum() for area, distance in zip(areas, distances))
    return {
        "HD95": max(_percentile(distance, area, 0.95) for area, distance in zip(areas, distances)),
        "ASSD": float(sum((area * distance).sum() for area, distance in zip(areas, distances)) / total),
        "SurfaceDice": float(close / total),
    }


def find_surface(mask: np.ndarray, spacing_mm: Sequence[float]) -> Surface:
    """Return the surface elements of a mask that is not empty.

    Outside of the array there is nothing.
    """
    codes = _neighbourhood_codes(mask)
    cubes = np.argwhere((codes > 0) & (codes < 2**2**mask.ndim - 1))
    areas, centres = _element_table(tuple(float(size) for size in spacing_mm))
    codes = codes[tuple(cubes.T)]
    return Surface(cubes * np.asarray(spacing_mm, dtype=np.float64) + centres[codes], areas[codes])


def _neighbourhood_codes(mask: np.ndarray) -> np.ndarray:
    """Return one number for each cube of 2 voxels per axis: bit i tells whether its i-th corner is in the mask."""
    padded = np.pad(mask.astype(np.uint8), 1)
    codes = np.zeros([n - 1 for n in padded.shape], dtype=np.uint8)
    for bit, corner in enumerate(product((0, 1), repeat=mask.ndim)):
        codes |= padded[tuple(slice(start, start + n) for start, n in zip(corner, codes.shape))] << bit
    return codes


@lru_cache(maxsize=64)
def _element_table(spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return area and centre of the surface inside a cube, for each code of its corners."""
    axes = len(spacing_mm)
    codes, parts = _surface_parts(axes)
    corners = parts * np.asarray(spacing_mm)
    edges = corners[:, 1:] - corners[:, :1]
    if axes == 2:
        sizes = np.linalg.norm(edges[:, 0], axis=-1)
    else:
        sizes = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1) / 2
    areas = np.bincount(codes, weights=sizes, minlength=2**2**axes)
    moments = [np.bincount(codes, weights=sizes * along, minlength=len(areas)) for along in corners.mean(axis=1).T]
    return areas, np.stack(moments, axis=-1) / np.maximum(areas, np.finfo(float).tiny)[:, None]


@lru_cache(maxsize=2)
def _surface_parts(axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles (in 2D the lines) for all codes: `(n,)` codes, and `(n, axes, axes)` corners of a unit cube.

    This asks marching cubes, or marching squares, for the surface in each of the possible cubes once.
    """
    from skimage.measure import find_contours, marching_cubes

    codes, parts = [], []
    for code in range(1, 2**2**axes - 1):
        cube = ((code >> np.arange(2**axes)) & 1).reshape((2,) * axes).astype(np.float32)
        if axes == 3:
            vertices, faces, _, _ = marching_cubes(cube, 0.5)
            found = vertices[faces]
        else:
            found = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in find_contours(cube, 0.5)])
        codes += [code] * len(found)
        parts.append(found)
    return np.array(codes), np.concatenate(parts)


def _distances(start: Surface, end: Surface) -> np.ndarray:
    """Return the distance from each element of one surface to the nearest one of the other, in mm."""
    from scipy.spatial import cKDTree

    return cKDTree(end.places).query(start.places)[0]


def _percentile(values: np.ndarray, weights: np.ndarray, fraction: float) -> float:
    """Return the smallest value up to which values hold this fraction of all weight."""
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    place = np.searchsorted(cumulated, fraction * cumulated[-1])
    return float(values[order[min(int(place), len(values) - 1)]])
