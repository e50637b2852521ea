"""Hold cases while postprocessing is decided.

Prediction and reference are compressed in memory, and read from disk once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunetv2.evaluation.confusion import Confusion, compute_confusion
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.postprocessing.components import bounding_box, find_smaller_components

Entry = Sequence[int]
"""The labels that count as one class."""


@dataclass(frozen=True)
class PackedArray:
    """An array as compressed bytes. Label maps shrink to a few percent."""

    shape: tuple[int, ...]
    dtype: str
    content: bytes

    @classmethod
    def pack(cls, array: np.ndarray) -> PackedArray:
        import blosc2

        array = np.ascontiguousarray(array)
        content = (
            blosc2.compress2(array, typesize=array.itemsize, codec=blosc2.Codec.LZ4, nthreads=1) if array.size else b""
        )
        return cls(array.shape, array.dtype.str, content)

    def unpack(self) -> np.ndarray:
        import blosc2

        raw = blosc2.decompress2(self.content, nthreads=1) if self.content else b""
        return np.frombuffer(raw, dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class CaseState:
    """A case inside the box of its predicted foreground. Nothing outside of it can change."""

    prediction: PackedArray
    reference: PackedArray
    labels: frozenset[int]
    """Those that are scored, see `compute_confusion`."""
    candidates: PackedArray | None = None
    """Where the entries that were tried last would remove something: number of the entry plus 1, elsewhere 0."""


def open_case(
    prediction_file: str, reference_file: str, reader: BaseReaderWriter, labels: Collection[int]
) -> tuple[CaseState, Confusion]:
    """Read a case; return it and how its two label maps agree as a whole.

    Args:
        labels: Those that are scored.

    Raises:
        ValueError: The shapes differ, or the prediction has values that are no whole numbers from 0 to 65535.
    """
    reference, prediction = (reader.read_seg(file)[0][0] for file in (reference_file, prediction_file))
    if reference.shape != prediction.shape:
        raise ValueError(
            f"{prediction_file} has shape {prediction.shape}, but its reference {reference_file} has {reference.shape}"
        )
    predicted = _as_labels(prediction, prediction_file)
    box = bounding_box(predicted) or (slice(0, 0),) * predicted.ndim
    state = CaseState(PackedArray.pack(predicted[box]), PackedArray.pack(reference[box]), frozenset(labels))
    return state, compute_confusion(reference, prediction, labels)


def try_entries(
    state: CaseState, accepted: Sequence[int], entries: Sequence[Entry]
) -> tuple[CaseState, list[Confusion]]:
    """Find the voxels that keeping each entry's largest component would remove.

    Args:
        state: The case.
        accepted: Numbers of those entries of the trial before whose removals are carried out first.
        entries: Disjoint collections of labels.

    Returns:
        The case with the removals of this trial noted, and for each entry the confusion of the voxels it removes.
    """
    prediction, reference = _carry_out(state, accepted), state.reference.unpack()
    groups = _number_entries(prediction, entries)
    candidates = np.where(find_smaller_components(groups), groups, 0).astype(groups.dtype, copy=False)
    touched = candidates > 0
    numbers, true, predicted = candidates[touched], reference[touched], prediction[touched]
    removals = [
        compute_confusion(true[mine], predicted[mine], state.labels)
        for mine in (numbers == number for number in range(1, len(entries) + 1))
    ]
    if accepted:
        state = replace(state, prediction=PackedArray.pack(prediction))
    return replace(state, candidates=PackedArray.pack(candidates)), removals


def _carry_out(state: CaseState, accepted: Sequence[int]) -> np.ndarray:
    prediction = state.prediction.unpack()
    if state.candidates is None or not accepted:
        return prediction
    is_removed = np.isin(state.candidates.unpack(), [number + 1 for number in accepted])
    return np.where(is_removed, prediction.dtype.type(0), prediction)


def _number_entries(prediction: np.ndarray, entries: Sequence[Entry]) -> np.ndarray:
    """Return for each voxel the number of the entry it belongs to plus 1, or 0."""
    highest = max([int(prediction.max(initial=0)), *(int(label) for entry in entries for label in entry)])
    numbers = np.zeros(highest + 1, dtype=np.uint8 if len(entries) < 255 else np.uint16)
    for number, entry in enumerate(entries, start=1):
        numbers[list(entry)] = number
    return numbers[prediction]


def _as_labels(prediction: np.ndarray, file: str) -> np.ndarray:
    lowest, highest = prediction.min(initial=0), prediction.max(initial=0)
    if lowest >= 0 and highest < 2**16:
        labels = prediction.astype(np.uint8 if highest < 256 else np.uint16)
        if np.array_equal(labels, prediction):
            return labels
    raise ValueError(
        f"{file} is no label map: expected whole numbers from 0 to 65535, its values go from {lowest} to {highest}"
    )
