"""Split the segmentation heads of a network into rows, a tensor for each output.

    decoder.seg_layers.0.weight (3, 32, 1, 1, 1)  ->  decoder.seg_layers.0.row0.weight (1, 32, 1, 1, 1), ... row2
    decoder.seg_layers.0.bias (3,)                ->  decoder.seg_layers.0.row0.bias (1,), ... row2

So a row is averaged over the sites that annotate its class, like any tensor over the sites that have it. Row 0 is that
of background.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from nnunetv2.federated.aggregation.matching import is_segmentation_layer
from nnunetv2.federated.errors import MatchingError
from nnunetv2.federated.protocol.messages import TensorEntry

_ROW = re.compile(r"((?:.*\.)?)row([0-9]{1,5})\.([^.]+)")


def row_name(tensor: str, row: int) -> str:
    """Return the name of one row of a head's tensor."""
    layer, _, leaf = tensor.rpartition(".")
    return f"{layer}.row{row}.{leaf}"


def row_of(name: str) -> tuple[str, int] | None:
    """Return the tensor and the number of a row; None for whole tensors."""
    found = _ROW.fullmatch(name) if is_segmentation_layer(name) else None
    return None if found is None else (f"{found[1]}{found[3]}", int(found[2]))


def whole_names(names: Iterable[str]) -> frozenset[str]:
    """Return the names of the tensors of which these are rows, or which they are."""
    return frozenset(name if (row := row_of(name)) is None else row[0] for name in names)


def find_heads(tensors: Iterable[TensorEntry], num_outputs: int) -> tuple[str, ...]:
    """Return the names of the tensors that have a row per output.

    Raises:
        MatchingError: There are none, so that the part of a class cannot be told from the rest of the network.
    """
    heads = tuple(
        entry.name
        for entry in tensors
        if is_segmentation_layer(entry.name) and entry.shape and entry.shape[0] == num_outputs
    )
    if not heads:
        raise MatchingError(
            f"--labels union: the network has no tensor below 'seg_layers' with a row for each of its {num_outputs} "
            "outputs, so what belongs to one class cannot be averaged by itself. Use a trainer with a U-Net of nnU-Net"
        )
    return heads


def split_entries(
    tensors: Iterable[TensorEntry], aliases: Mapping[str, str], heads: Collection[str], trained: Collection[int]
) -> tuple[tuple[TensorEntry, ...], dict[str, str]]:
    """Return a manifest in which heads are rows, and the further names of its tensors.

    Args:
        trained: Rows that the site trains. It only receives the others.
    """
    entries: list[TensorEntry] = []
    rows: dict[str, int] = {}
    for entry in tensors:
        if entry.name not in heads:
            entries.append(entry)
            continue
        rows[entry.name] = entry.shape[0]
        entries += [
            entry.model_copy(
                update={
                    "name": row_name(entry.name, row),
                    "shape": (1, *entry.shape[1:]),
                    "only_received": None if row in trained else True,
                }
            )
            for row in range(entry.shape[0])
        ]
    split: dict[str, str] = {}
    for alias, name in aliases.items():
        numbers = range(rows[name]) if name in rows else None
        split |= {alias: name} if numbers is None else {row_name(alias, n): row_name(name, n) for n in numbers}
    return tuple(entries), split


def split_weights(weights: Mapping[str, np.ndarray], heads: Collection[str]) -> dict[str, np.ndarray]:
    """Return weights in which heads are rows."""
    split: dict[str, np.ndarray] = {}
    for name, values in weights.items():
        if name in heads:
            split |= {row_name(name, row): values[row : row + 1] for row in range(len(values))}
        else:
            split[name] = values
    return split


def join_weights(weights: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights in which rows are in their heads again.

    Args:
        present: Values of the heads, of which rows that are not among `weights` stay.
    """
    joined: dict[str, np.ndarray] = {}
    for name, values in weights.items():
        row = row_of(name)
        if row is None:
            joined[name] = values
            continue
        head, number = row
        if head not in joined:
            joined[head] = np.array(present[head], np.float32)
        joined[head][number] = values[0]
    return joined


def join_names(names: Mapping[str, str]) -> dict[str, str | tuple[str, ...]]:
    """Return the tensor of each parameter of a network, or its rows in order.

    Args:
        names: Parameter or row -> tensor.
    """
    joined: dict[str, str | tuple[str, ...]] = {}
    rows: dict[str, dict[int, str]] = {}
    for name, tensor in names.items():
        row = row_of(name)
        if row is None:
            joined[name] = tensor
        else:
            joined.setdefault(row[0], ())  # in its place among the parameters
            rows.setdefault(row[0], {})[row[1]] = tensor
    return joined | {head: tuple(found[number] for number in sorted(found)) for head, found in rows.items()}
