"""Count how two label maps agree, in one pass over their voxels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Voxels per step: the codes of a step stay in the cache, however large the image.
_STEP_VOXELS = 2**18
# Up to so many different values are counted in a table of all their pairs without looking for the values first.
_DENSE_VALUES = 256


@dataclass(frozen=True)
class Confusion:
    """Number of voxels per pair of labels.

                 prediction
                 values[0]  values[1]  ...
    reference  +---------------------
    values[0]  |
    values[1]  |     counts
    """

    values: np.ndarray
    counts: np.ndarray

    def without_reference(self, label: int) -> Confusion:
        """Leave out the voxels that the reference gives this label."""
        counts = self.counts.copy()
        counts[self.values == label] = 0
        return Confusion(self.values, counts)

    def moved_to(self, label: int, moved: Confusion) -> Confusion:
        """Return the counts once the voxels that `moved` counts are predicted as `label` instead."""
        values = np.union1d(np.union1d(self.values, moved.values), [label])
        taken = moved._on(values)
        counts = self._on(values) - taken
        counts[:, values == label] += taken.sum(axis=1, keepdims=True)
        return Confusion(values, counts)

    def _on(self, values: np.ndarray) -> np.ndarray:
        """Return the counts in a table of more values, sorted as ours are."""
        counts = np.zeros((len(values), len(values)), dtype=np.int64)
        places = np.searchsorted(values, self.values)
        counts[np.ix_(places, places)] = self.counts
        return counts

    def of_class(self, labels: Sequence[int]) -> tuple[int, int, int, int]:
        """Return TP, FP, FN and TN of the union of some labels."""
        inside = np.zeros(len(self.values), dtype=bool)
        for label in labels:
            inside |= self.values == label
        rows_in, rows_out = self.counts[inside].sum(axis=0), self.counts[~inside].sum(axis=0)
        tp, fp = int(rows_in[inside].sum()), int(rows_out[inside].sum())
        fn, tn = int(rows_in[~inside].sum()), int(rows_out[~inside].sum())
        return tp, fp, fn, tn


def compute_confusion(reference: np.ndarray, prediction: np.ndarray) -> Confusion:
    """Count the pairs of values of two arrays of equal shape.

    Raises:
        ValueError: The shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"the reference has shape {reference.shape}, the prediction {prediction.shape}")
    if reference.size == 0:
        return Confusion(np.zeros(0), np.zeros((0, 0), dtype=np.int64))
    reference, prediction = reference.reshape(-1), prediction.reshape(-1)
    values, encode = _choose_code(reference, prediction)
    counts = np.zeros(len(values) ** 2, dtype=np.int64)
    for start in range(0, reference.size, _STEP_VOXELS):
        step = slice(start, start + _STEP_VOXELS)
        codes = encode(reference[step]) * len(values) + encode(prediction[step])
        counts += np.bincount(codes, minlength=len(counts))
    return Confusion(values, counts.reshape(len(values), len(values)))


def _choose_code(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, Callable]:
    """Return the values that occur, and what turns an array of them into their numbers."""
    lowest, highest = min(reference.min(), prediction.min()), max(reference.max(), prediction.max())
    is_dense = float(highest) - float(lowest) < _DENSE_VALUES and _are_whole(reference) and _are_whole(prediction)
    if is_dense:
        offset = int(lowest)
        return np.arange(offset, int(highest) + 1), lambda array: array.astype(np.intp) - offset
    values = np.union1d(reference, prediction)
    return values, lambda array: np.searchsorted(values, array)


def _are_whole(array: np.ndarray) -> bool:
    if array.dtype.kind in "iub":
        return True
    steps = (array[start : start + _STEP_VOXELS] for start in range(0, array.size, _STEP_VOXELS))
    return all(np.array_equal(step, np.rint(step)) for step in steps)
