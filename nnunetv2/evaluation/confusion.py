"""Count how two label maps agree, in one pass over their voxels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

Encode = Callable[[np.ndarray], np.ndarray]

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


def compute_confusion(
    reference: np.ndarray, prediction: np.ndarray, labels: Collection[int] | None = None
) -> Confusion:
    """Count the pairs of values of two arrays of equal shape.

    Args:
        labels: All that will be asked for. Other values are counted together, under a number that is none of these, so
            that no table of all pairs of instances or of intensities is needed. None: every value counts for itself.

    Raises:
        ValueError: The shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"the reference has shape {reference.shape}, the prediction {prediction.shape}")
    if reference.size == 0:
        return Confusion(np.zeros(0), np.zeros((0, 0), dtype=np.int64))
    reference, prediction = reference.reshape(-1), prediction.reshape(-1)
    values, encode = _choose_code(reference, prediction, labels)
    counts = np.zeros(len(values) ** 2, dtype=np.int64)
    for start in range(0, reference.size, _STEP_VOXELS):
        step = slice(start, start + _STEP_VOXELS)
        codes = encode(reference[step]) * len(values) + encode(prediction[step])
        counts += np.bincount(codes, minlength=len(counts))
    return Confusion(values, counts.reshape(len(values), len(values)))


def _choose_code(
    reference: np.ndarray, prediction: np.ndarray, labels: Collection[int] | None
) -> tuple[np.ndarray, Encode]:
    """Return the values told apart, and the function from voxels to numbers."""
    possible = _few_whole_values(reference, prediction)
    if labels is not None:
        values, encode = _code_of_labels(labels)
        return values, encode if possible is None else _looked_up(encode, possible)
    if possible is not None:
        return possible, lambda array: array.astype(np.intp) - possible[0]
    values = np.union1d(reference, prediction)
    return values, lambda array: np.searchsorted(values, array)


def _few_whole_values(reference: np.ndarray, prediction: np.ndarray) -> np.ndarray | None:
    """Return all whole numbers from the lowest value to the highest; None if they are many, or others occur."""
    lowest, highest = min(reference.min(), prediction.min()), max(reference.max(), prediction.max())
    if float(highest) - float(lowest) < _DENSE_VALUES and are_whole(reference) and are_whole(prediction):
        return np.arange(int(lowest), int(highest) + 1)
    return None


def _code_of_labels(labels: Collection[int]) -> tuple[np.ndarray, Encode]:
    """Tell background and these labels apart.

    Everything else has the number behind theirs, and stands in the table under a value that none of them has.
    """
    known = np.unique([0, *labels])

    def encode(array: np.ndarray) -> np.ndarray:
        places = np.searchsorted(known, array)
        return np.where(known.take(places, mode="clip") == array, places, len(known))

    return np.append(known, known[-1] + 1), encode


def _looked_up(encode: Encode, possible: np.ndarray) -> Encode:
    """Return a faster code of arrays that have no values but these consecutive ones."""
    numbers = encode(possible)
    return lambda array: numbers[array.astype(np.intp) - possible[0]]


def are_whole(array: np.ndarray) -> bool:
    """Tell whether all values are whole numbers, as those of a label map are."""
    if array.dtype.kind in "iub":
        return True
    flat = array.reshape(-1)
    steps = (flat[start : start + _STEP_VOXELS] for start in range(0, flat.size, _STEP_VOXELS))
    return all(np.array_equal(step, np.rint(step)) for step in steps)
