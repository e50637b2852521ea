"""Answer planners' questions about spacings and shapes, from lists or from order statistics.

A fingerprint usually lists every case. One that a federation pooled by order statistics alone (`--geometry quantiles`)
has the field `geometry_statistics` in the place of the lists, with the order statistics that planners use; either gives
the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnunetv2.errors import InvalidInputError
from nnunetv2.preprocessed_data.fingerprint_files import GEOMETRY_STATISTICS, LISTS
from nnunetv2.preprocessing.resampling.default_resampling import round_lengths

_PLAN_AGAIN = "nnUNetv2_plan_and_preprocess --federated, with the same options at all sites"


class CaseGeometry(Protocol):
    """The questions of planners about the cases of a dataset.

    Spacings in mm and shapes in voxels, per axis of arrays.
    """

    def spacing_percentile(self, percentile: float) -> np.ndarray:
        """Return np.percentile of the spacings: 10 or 50."""
        ...

    def median_spacing(self) -> np.ndarray:
        """Return np.median of the spacings.

        It may differ from their percentile 50 in the last digit.
        """
        ...

    def median_shape(self) -> np.ndarray:
        """Return np.median of the shapes after cropping."""
        ...

    def median_resampled_shape(self, target: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return np.median of the shapes at this spacing. May be 0."""
        ...


def geometry_of(fingerprint: Mapping[str, Any]) -> CaseGeometry:
    """Return the geometry that a fingerprint describes, in either form."""
    if GEOMETRY_STATISTICS in fingerprint:
        return PooledGeometry(fingerprint[GEOMETRY_STATISTICS])
    return ListedGeometry(*(fingerprint[name] for name in LISTS))


@dataclass(frozen=True)
class ListedGeometry:
    """The geometry of cases that are listed."""

    spacings: Sequence[Sequence[float]]
    shapes: Sequence[Sequence[int]]

    def spacing_percentile(self, percentile: float) -> np.ndarray:
        return np.percentile(np.vstack(self.spacings), percentile, axis=0)

    def median_spacing(self) -> np.ndarray:
        return np.median(self.spacings, axis=0)

    def median_shape(self) -> np.ndarray:
        return np.median(self.shapes, axis=0)

    def median_resampled_shape(self, target: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.median(resampled_shapes(self.spacings, self.shapes, target), axis=0)


@dataclass(frozen=True)
class PooledGeometry:
    """The geometry of cases of which order statistics are known."""

    statistics: Mapping[str, Any]
    """The content of `geometry_statistics`."""

    def spacing_percentile(self, percentile: float) -> np.ndarray:
        return self._of("spacings", f"percentile_{percentile:g}")

    def median_spacing(self) -> np.ndarray:
        return self._of("spacings", "median")

    def median_shape(self) -> np.ndarray:
        return self._of("shapes_after_crop", "median")

    def median_resampled_shape(self, target: Sequence[float] | np.ndarray) -> np.ndarray:
        known = {tuple(entry["spacing"]): entry["median"] for entry in self.statistics.get("resampled_shapes", ())}
        wanted = tuple(map(float, target))
        if wanted not in known:
            raise InvalidInputError(
                f"the median shape of all sites' cases at a spacing of {wanted} mm is not known: the sites have not "
                f"pooled it for these plans. Run {_PLAN_AGAIN}"
            )
        return np.array(known[wanted], float)

    def _of(self, what: str, name: str) -> np.ndarray:
        try:
            return np.array(self.statistics[what][name], float)
        except (KeyError, TypeError) as error:
            raise InvalidInputError(
                f"{GEOMETRY_STATISTICS} of the fingerprint lacks {name} of {what}: the sites have not pooled it. Run "
                f"{_PLAN_AGAIN}"
            ) from error


class FingerprintWithoutLists(dict[str, Any]):
    """A fingerprint that says to planners of others why it lists no cases."""

    def __missing__(self, name: str) -> Any:
        """Raise InvalidInputError for the lists, KeyError for anything else."""
        if name in LISTS:
            raise InvalidInputError(
                f"the fingerprint has no {name}: the federation pools geometry as order statistics only (--geometry "
                "quantiles), and this planner reads every case. Use a planner that asks "
                "experiment_planners.case_geometry, or ask the coordinating site for a federation with --geometry list"
            )
        raise KeyError(name)


def resampled_shapes(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], target: Sequence[float] | np.ndarray
) -> list[list[int]]:
    """Return the shape of each case once it has the target spacing.

    An axis of a thin case may have no voxel.
    """
    # Without the one voxel that preprocessing keeps of such a case: plans are those of the release.
    return [round_lengths(shape, spacing, target) for spacing, shape in zip(spacings, shapes)]
