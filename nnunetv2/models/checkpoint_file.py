"""Write a training's state into a file and read it back safely.

Nothing that a foreign file asks for is run.

A checkpoint is a dict that `torch.save` has written. Besides tensors it holds NumPy scalars (the curves), a
`torch.device` and plain containers, so the reader admits these and refuses everything else: a pickle is a program, and
checkpoints are passed from hospital to hospital.
"""

from __future__ import annotations

import _codecs
import collections
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2.utilities.atomic_write import replacing

logger = logging.getLogger(__name__)

ALLOW_UNSAFE_VARIABLE = "nnUNet_allow_unsafe_checkpoints"

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"

_BYTES_OF_ZIP_END = (1 << 16) + 22
"""The directory of a zip archive is found from within that many bytes at its end."""

_NUMPY_DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "U1",
    "S1",
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used."""


class DamagedCheckpointError(CheckpointError):
    """The file is truncated, or no checkpoint at all."""


class UntrustedCheckpointError(CheckpointError):
    """The file holds objects that only running its code could rebuild."""


def save_checkpoint_file(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint.

    Even if the process is killed meanwhile, `path` is the old file or the complete new one.
    """
    with replacing(path) as written:
        torch.save(dict(checkpoint), written)


def is_better(score: float, best: float | None) -> bool:
    """Tell whether a score is the best so far; NaN is worse than any number."""
    if best is None:
        return True
    return bool(score > best) or bool(np.isnan(best) and not np.isnan(score))


def load_checkpoint_file(
    path: str | os.PathLike[str], map_location: torch.device | str = "cpu", *, mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint of this package or of the reference.

    Args:
        path: The file.
        map_location: Where its tensors go.
        mmap: Leave the tensors in the file until they are used, which makes looking at the rest fast. CPU only.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read, which tells nothing about its content.
        DamagedCheckpointError: It is truncated or no checkpoint.
        UntrustedCheckpointError: It holds more than tensors, numbers, text and containers. Set the environment
            variable nnUNet_allow_unsafe_checkpoints=1 to load it all the same, if you trust its origin. A TorchScript
            file is a program, which nothing makes a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    options: dict[str, Any] = {"map_location": map_location, "mmap": mmap or None}
    is_trusted = _allows_unsafe_checkpoints()
    if is_trusted and not _begins_like_zip(path):  # torch before 1.6 wrote no archives, which cannot be mapped either
        options["mmap"] = None
    elif not _is_complete_zip(path):
        raise DamagedCheckpointError(
            f"{path} is damaged or no checkpoint: it is no complete zip archive ({path.stat().st_size} bytes)"
        )
    if _is_torchscript(path):
        raise UntrustedCheckpointError(
            f"{path} is a TorchScript file, which is a program and no checkpoint: expected "
            "a dict that torch.save has written"
        )
    try:
        load = _load_trusted if is_trusted else _load_allow_listed
        checkpoint = load(path, options)
    except pickle.UnpicklingError as error:
        if is_trusted:
            raise DamagedCheckpointError(f"{path} is damaged: {_first_line(error)}") from error
        raise UntrustedCheckpointError(
            f"{path} holds more than tensors, numbers, text and containers, and rebuilding the rest would run code "
            f"from the file: {_first_line(error)} If you trust its origin, set the environment variable "
            f"{ALLOW_UNSAFE_VARIABLE}=1 and try again"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def find_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints that lie in a fold, whatever their state: final, latest, best."""
    return [path for name in (FINAL, LATEST, BEST) if (path := Path(folder) / name).is_file()]


def rank_checkpoints(folder: str | os.PathLike[str], report: Callable[[str], object] = logger.warning) -> list[Path]:
    """Return the usable checkpoints of a fold's latest training, the best for going on first.

    That is the one with most epochs behind it; of equals final comes before latest before best. Files that turn out to
    be damaged are passed over, as are those of a training that was begun earlier: a new training in the folder of a
    finished one keeps its checkpoint_final until there is a new one.

    Args:
        report: Takes a line about each file that is passed over.

    Raises:
        OSError: A file cannot be read. It may be the very one to go on with.
        UntrustedCheckpointError: As `load_checkpoint_file`.
    """
    epochs, began = {}, {}
    for path in find_checkpoints(folder):
        try:
            checkpoint = load_checkpoint_file(path, mmap=True)
            epochs[path], began[path] = int(checkpoint["current_epoch"]), _beginning_of(checkpoint)
        except DamagedCheckpointError as error:
            report(f"passing over an unusable checkpoint: {error}")
        except KeyError as error:
            report(f"passing over an unusable checkpoint: {path} has no {error}")
    latest = max(began.values(), default=-math.inf)
    for path in epochs:
        if began[path] < latest:
            report(
                f"passing over {path.name}, after {epochs[path]} epochs of a training that was begun before the latest "
                "one of this fold"
            )
    # A stable sort.
    return sorted((path for path in epochs if began[path] == latest), key=lambda path: -epochs[path])


def _beginning_of(checkpoint: Mapping[str, Any]) -> float:
    """Return when the first epoch of a training began, in seconds, which tells it from others in the same folder.

    Every checkpoint says so, also one of the reference; `--c` keeps it. -inf, if it does not.
    """
    moments = (checkpoint.get("logging") or {}).get("epoch_start_timestamps")
    moment = float(moments[0]) if moments else -math.inf
    return -math.inf if math.isnan(moment) else moment


def _begins_like_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _is_complete_zip(path: Path) -> bool:
    with path.open("rb") as file:
        # zipfile takes errors in reading for another kind of file, so it is to find none.
        file.seek(max(0, path.stat().st_size - _BYTES_OF_ZIP_END))
        file.read()
        return zipfile.is_zipfile(file)


def _is_torchscript(path: Path) -> bool:
    """Tell whether a zip archive is a TorchScript file. torch refuses it as well, in other words."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _load_trusted(path: Path, options: dict[str, Any]) -> object:
    return torch.load(path, weights_only=False, **options)


def _load_allow_listed(path: Path, options: dict[str, Any]) -> object:
    with torch.serialization.safe_globals([(thing, name) for name, thing in _allow_list().items()]):
        return torch.load(path, weights_only=True, **options)


@lru_cache(maxsize=1)
def _allow_list() -> dict[str, object]:
    """Map names that checkpoints may refer to, besides torch's, to their objects."""
    dtype_classes = {type(np.dtype(name)) for name in _NUMPY_DTYPES}
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    multiarray = {"scalar": scalar, "_reconstruct": reconstruct}
    return {
        **{
            f"{module}.{name}": thing
            for module in ("numpy._core.multiarray", "numpy.core.multiarray")
            for name, thing in multiarray.items()
        },
        **{f"{cls.__module__}.{cls.__name__}": cls for cls in dtype_classes},
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "torch.device": torch.device,
        "torch.Size": torch.Size,
        "collections.OrderedDict": collections.OrderedDict,
        "collections.defaultdict": collections.defaultdict,
        "_codecs.encode": _codecs.encode,
        "builtins.set": set,
    }


def _allows_unsafe_checkpoints() -> bool:
    return os.environ.get(ALLOW_UNSAFE_VARIABLE, "").strip().lower() in ("1", "true", "t", "yes", "on")


def _first_line(error: BaseException) -> str:
    """Return the part of torch's messages that names the failure.

    Its advice about `weights_only` follows below.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported global" in line or "Unsupported operand" in line]
    return (named or lines or [type(error).__name__])[0]
