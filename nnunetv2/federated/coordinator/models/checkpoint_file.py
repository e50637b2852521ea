"""Write a checkpoint that torch.load reads, without torch: the coordinator needs none.

A checkpoint is a zip archive, stored without compression:

    archive/data.pkl      a pickle of the whole dictionary; tensors refer to storages by number
    archive/byteorder     "little"
    archive/data/<n>      the bytes of storage n, beginning at a multiple of 64 in the file
    archive/version       "3"

Only writing happens here. The pickle names no class but OrderedDict and torch's own tensors, so that
`torch.load(..., weights_only=True)` accepts it.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nnunetv2.federated.aggregation.matching import normalise_name
from nnunetv2.federated.protocol.document import Document, TensorSpec
from nnunetv2.federated.protocol.messages import Aggregate
from nnunetv2.utilities.atomic_write import replacing

_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_PADDING_FIELD = b"FB"
_PLAIN = (type(None), bool, int, float, str)


def model_checkpoint(
    *,
    plans: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: Mapping[str, Any],
    mirroring_axes: Sequence[int] | None,
    current_epoch: int,
    trainer_name: str = "nnUNetTrainer",
) -> dict[str, Any]:
    """Return all entries of an nnU-Net checkpoint but `network_weights`.

    There is no optimizer state and no curve: those stayed at the sites.
    """
    return {
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": current_epoch,
        "init_args": {
            "plans": dict(plans),
            "configuration": configuration,
            "fold": fold if fold == "all" else int(fold),
            "dataset_json": dict(dataset_json),
        },
        "trainer_name": trainer_name,
        "network_trainer": trainer_name,  # it builds the network, so prediction takes no other class in its place
        "inference_allowed_mirroring_axes": None if mirroring_axes is None else tuple(mirroring_axes),
    }


def write_checkpoint(
    path: Path,
    document: Document[Aggregate],
    names: Mapping[str, str | tuple[str, ...]],
    content: Mapping[str, Any],
    *,
    counters: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Write a checkpoint atomically, copying the tensors piece by piece.

    Args:
        path: Where the checkpoint appears once it is complete.
        document: Holds the tensors.
        names: Parameter of the network -> tensor in the document, or tensors that lie one behind the other along the
            first axis. Parameters of the same tensor share its storage, as aliases do in a network. Prefixes of
            wrappers are removed.
        content: The other entries: None, numbers, texts, and lists, tuples and dicts of these.
        counters: Parameters that only count steps, and are written as int64 zeros -> their shapes.

    Raises:
        WireError: The document does not hold a tensor.
        TypeError: The content holds something that is not plain.
    """
    _check_plain(content, "checkpoint")
    held_by = {parameter: (one,) if isinstance(one, str) else one for parameter, one in names.items()}
    numbers = {tensors: str(number) for number, tensors in enumerate(dict.fromkeys(held_by.values()))}
    specs = {tensors: _joined([document.spec(tensor) for tensor in tensors]) for tensors in numbers}
    weights = OrderedDict(
        (normalise_name(parameter), _Tensor(numbers[tensors], specs[tensors])) for parameter, tensors in held_by.items()
    )
    for parameter, shape in counters.items():
        weights[normalise_name(parameter)] = _Tensor(f"counter{len(weights)}", TensorSpec("I64", shape))
    pickled = io.BytesIO()
    _CheckpointPickler(pickled, protocol=2).dump({"network_weights": weights, **content})
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "archive/data.pkl", [pickled.getvalue()])
        _add(archive, "archive/byteorder", [b"little"])
        for tensors, number in numbers.items():
            pieces = chain.from_iterable(document.pieces(tensor) for tensor in tensors)
            _add(archive, f"archive/data/{number}", pieces, size=specs[tensors].nbytes)
        for counter in list(weights.values())[len(names) :]:
            _add(archive, f"archive/data/{counter.number}", [bytes(counter.spec.nbytes)], size=counter.spec.nbytes)
        _add(archive, "archive/version", [b"3\n"])


def _joined(specs: Sequence[TensorSpec]) -> TensorSpec:
    """Return the tensor that several make, one behind the other along the first axis."""
    first = specs[0]
    return first if len(specs) == 1 else TensorSpec(first.dtype, (sum(one.shape[0] for one in specs), *first.shape[1:]))


def parameter_names(tensors: Iterable[str], aliases: Mapping[str, str], canonical: Mapping[str, str]) -> dict[str, str]:
    """Map every name of a site's network to its tensor in the aggregate.

    For `write_checkpoint`.

    Args:
        tensors: Names of the site's distinct tensors that are in the aggregate.
        aliases: Further name -> name in `tensors`.
        canonical: Name in `tensors` -> name in the aggregate.

    Raises:
        KeyError: A tensor is not in the aggregate, so this network cannot be made from it.
    """
    names = {name: canonical[name] for name in tensors}
    return names | {alias: names[name] for alias, name in aliases.items() if name in names}


# ---------------------------------------------------------------------------------------------------------- pickling
@dataclass(frozen=True)
class _Global:
    """Stands for a function or class by its name, which the reader imports and we do not."""

    module: str
    name: str

    def __call__(self) -> None:
        raise TypeError(f"{self.module}.{self.name} is only a name here")  # the pickler insists on a callable


@dataclass(frozen=True, eq=False)
class _Storage:
    number: str
    spec: TensorSpec


@dataclass(frozen=True, eq=False)
class _Tensor:
    """Stands for a contiguous tensor that fills storage `number`."""

    number: str
    spec: TensorSpec


_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_STORAGES = {
    "F32": _Global("torch", "FloatStorage"),
    "F16": _Global("torch", "HalfStorage"),
    "I64": _Global("torch", "LongStorage"),
}


_Pickler: Any = pickle._Pickler  # its methods are known to no stub


class _CheckpointPickler(_Pickler):  # type: ignore[misc]  # the one in C imports every class that it is to name
    """Pickle plain values, and the stand-ins above as torch's objects."""

    dispatch = dict(_Pickler.dispatch)

    def persistent_id(self, obj: Any) -> tuple[object, ...] | None:
        """Refer to storages by number, in torch's way."""
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.spec.dtype], obj.number, "cpu", obj.spec.size
        return None

    def save_global_name(self, obj: _Global) -> None:
        """Write a name without importing its object, unlike the base class."""
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_tensor(self, obj: _Tensor) -> None:
        """Write the call that rebuilds a tensor: storage, offset, shape, strides, requires_grad, hooks."""
        arguments: tuple[object, ...] = (
            _Storage(obj.number, obj.spec),
            0,
            obj.spec.shape,
            _strides(obj.spec.shape),
            False,
            OrderedDict(),
        )
        self.save_reduce(_REBUILD_TENSOR, arguments, obj=obj)

    dispatch[_Global] = save_global_name
    dispatch[_Tensor] = save_tensor


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def _check_plain(value: Any, place: str) -> None:
    if type(value) in _PLAIN:
        return
    if type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif type(value) is dict:
        for key, item in value.items():
            _check_plain(key, f"a key of {place}")
            _check_plain(item, f"{place}[{key!r}]")
    else:
        raise TypeError(f"{place} is a {type(value).__name__}; a checkpoint holds plain values and tensors only")


# ------------------------------------------------------------------------------------------------------------ zipping
def _add(archive: zipfile.ZipFile, name: str, pieces: Iterable[bytes | memoryview], *, size: int = 0) -> None:
    """Add a member whose data begin at a multiple of 64, so that torch can map it into memory."""
    member = zipfile.ZipInfo(name)  # dated 1980, so that equal models are equal files
    member.file_size = size  # decides between the small and the large form of the header
    is_large = size * 1.05 > zipfile.ZIP64_LIMIT
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name) + 20 * is_large + 4
    padding = -begin % _ALIGNMENT
    member.extra = _PADDING_FIELD + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(member, "w") as file:
        for piece in pieces:
            file.write(piece)
