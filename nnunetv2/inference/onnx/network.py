"""Open an ONNX file and run its network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from nnunetv2.inference.onnx.metadata import ModelDescription, OnnxFileError, decode_metadata
from nnunetv2.utilities.device import usable_cpu_count

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Devices, and their names in onnxruntime."""
_ERRORS_ONLY = 3


class OnnxNetwork:
    """The network of an ONNX file, and its description in the file.

    Args:
        device: A key of `PROVIDERS`.
        num_threads: Threads of a run on the CPU. Default: OMP_NUM_THREADS, else the cores that this process may use.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: onnxruntime is not installed.
        OnnxFileError: It is no ONNX file, none of this package, or none that this onnxruntime can run.
        ValueError: onnxruntime has no such device.
    """

    def __init__(self, file: str | os.PathLike[str], *, device: str = "cpu", num_threads: int | None = None) -> None:
        onnxruntime = _import_onnxruntime()
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"there is no ONNX file {self.file}")
        _require_device(device, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or _default_num_threads()
        options.log_severity_level = _ERRORS_ONLY
        # Threads that wait busily for the next run take time from preprocessing and export.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(self.file, options, providers=[PROVIDERS[device]])
        except Exception as error:  # each kind of failure has a class of its own, without a common one
            raise OnnxFileError(_explain(error, self.file, onnxruntime.__version__)) from error
        self.description: ModelDescription = decode_metadata(
            self._session.get_modelmeta().custom_metadata_map, self.file
        )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise OnnxFileError(
                f"{self.file} has {len(inputs)} inputs and {len(outputs)} outputs; expected one of each"
            )
        self._input = inputs[0].name
        self.input_shape: Sequence[int | str] = inputs[0].shape
        """(batch, channels, *patch); sizes that may vary are names."""
        self.output_shape: Sequence[int | str] = outputs[0].shape

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Return the logits `(b, classes, *patch)` of tiles `(b, c, *patch)`, both float32."""
        return self._session.run(None, {self._input: tiles})[0]


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ImportError("ONNX files are run by the package onnxruntime: pip install onnxruntime") from error
    return onnxruntime


def _require_device(device: str, available: Sequence[str]) -> None:
    if device not in PROVIDERS:
        raise ValueError(f"unknown device {device!r}: use one of {', '.join(PROVIDERS)}")
    if PROVIDERS[device] not in available:
        raise ValueError(
            f"device {device} was asked for, but this onnxruntime has {', '.join(available)} only. Install "
            "onnxruntime-gpu in its place for GPUs of NVIDIA, or use -device cpu"
        )


def _default_num_threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else usable_cpu_count()


def _explain(error: Exception, file: Path, version: str) -> str:
    reason = " ".join(str(error).split())
    if "opset" in reason.lower() or "NotImplemented" in type(error).__name__ or "is not a registered" in reason:
        return (
            f"{file} needs an operator set that onnxruntime {version} does not have ({reason}). Export the model again "
            "with a smaller -opset, or install a later onnxruntime"
        )
    return f"{file} cannot be opened: it is damaged, or no ONNX file ({reason})"
