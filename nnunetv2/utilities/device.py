"""Decide how a network runs on a device: precision, memory layout and threads.

On a CPU, networks run in bfloat16 where the processor multiplies bfloat16 matrices in hardware (AMX-BF16 or
AVX512-BF16), and in float32 elsewhere. The environment variable nnUNet_cpu_autocast decides otherwise: 0, false, f, no
or off keep float32 everywhere; 1, true, t, yes or on ask for bfloat16 even where it is emulated and slow. In the same
way nnUNet_mps_autocast asks for float16 in predictions on MPS, where float32 is the default.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    NetworkOrTensor = TypeVar("NetworkOrTensor", torch.nn.Module, torch.Tensor)

logger = logging.getLogger(__name__)

CPU_AUTOCAST_VARIABLE = "nnUNet_cpu_autocast"
MPS_AUTOCAST_VARIABLE = "nnUNet_mps_autocast"
_NO = ("0", "false", "f", "no", "off")
_YES = ("1", "true", "t", "yes", "on")


@lru_cache(maxsize=1)
def has_torch() -> bool:
    """Tell whether torch is installed, without importing it. Prediction with ONNX files does without."""
    return find_spec("torch") is not None


def resolve_device(name: str) -> torch.device:
    """Turn the value of `-device` into a device that exists.

    Raises:
        ValueError: The name is unknown, or torch sees no such device on this machine.
    """
    import torch

    is_available = {"cpu": lambda: True, "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name not in is_available:
        raise ValueError(f"unknown device {name!r}: use one of {', '.join(is_available)}")
    if not is_available[name]():
        raise ValueError(
            f"device {name} was asked for, but torch {torch.__version__} finds none on this machine; "
            "pass -device cpu to run without it"
        )
    return torch.device(name)


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Tell whether this processor multiplies bfloat16 matrices in hardware (AMX-BF16 or AVX512-BF16)."""
    import torch

    # These queries are not public and come and go between versions of torch.
    queries = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    if any(query is not None and query() for query in queries):
        return True
    return _cpu_flags_name_bf16(_read_cpu_info())


def wants_cpu_autocast() -> bool:
    """Tell whether networks run in bfloat16 on the CPU.

    The environment decides, else the capabilities of the processor.

    Raises:
        ValueError: nnUNet_cpu_autocast is set to something that is neither yes nor no.
    """
    choice = _read_choice(CPU_AUTOCAST_VARIABLE)
    return cpu_has_bf16() if choice is None else choice


def wants_mps_autocast() -> bool:
    """Tell whether networks predict in float16 on MPS.

    If the environment asks for it, and this torch can.

    Raises:
        ValueError: nnUNet_mps_autocast is set to something that is neither yes nor no.
    """
    import torch

    if not _read_choice(MPS_AUTOCAST_VARIABLE):
        return False
    if not torch.amp.is_autocast_available("mps"):
        logger.warning(
            "%s is set, but torch %s has no half precision on MPS: predicting in float32",
            MPS_AUTOCAST_VARIABLE,
            torch.__version__,
        )
        return False
    return True


def _read_choice(variable: str) -> bool | None:
    """Return the yes or no of an environment variable; None if it is unset or empty."""
    choice = os.environ.get(variable, "").strip().lower()
    if choice in _NO:
        return False
    if choice in _YES:
        return True
    if choice:
        raise ValueError(f"{variable} is {choice!r}: set it to 1 or 0, or unset it")
    return None


def autocast_context(device: torch.device | str, *, is_inference: bool = False) -> AbstractContextManager:
    """Return the context in which networks run on a device.

    float16 on CUDA, bfloat16 on capable CPUs, else float32.

    Args:
        is_inference: Nothing is trained, so that float16 on MPS, if nnUNet_mps_autocast asks for it, needs no scaling
            of gradients.
    """
    import torch

    device_type = torch.device(device).type
    if device_type == "cuda":
        return torch.autocast("cuda", enabled=True)
    if device_type == "cpu" and wants_cpu_autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)
    if device_type == "mps" and is_inference and wants_mps_autocast():
        return torch.autocast("mps", dtype=torch.float16)
    return nullcontext()


def prefers_channels_last(device: torch.device | str) -> bool:
    """Tell whether networks are faster with channels as the last axis.

    In bfloat16 on a CPU with AMX.

    Its matrix units take that layout as it is. With AVX512-BF16 alone, and in float32, the plain layout is faster, by
    10 to 30 % in training (`benchmarks/training.py`) and up to 20 % in prediction.
    """
    import torch

    return torch.device(device).type == "cpu" and wants_cpu_autocast() and _cpu_has_amx()


def to_fast_memory_format_(network_or_tensor: NetworkOrTensor, device: torch.device | str) -> NetworkOrTensor:
    """Lay out 4-D and 5-D tensors channels-last where that is faster, see `prefers_channels_last`.

    A network is changed in place and returned. A tensor is returned in the new layout, its values and shape unchanged.
    """
    import torch

    if not prefers_channels_last(device):
        return network_or_tensor
    if isinstance(network_or_tensor, torch.Tensor):
        return _channels_last(network_or_tensor)
    # Parameter by parameter, since Module.to() takes a single format and fails on weights of the other rank.
    for parameter in network_or_tensor.parameters():
        parameter.data = _channels_last(parameter.data)
    return network_or_tensor


def set_torch_threads(device_type: str) -> None:
    """Give torch all cores of this process on `cpu`, and one on `cuda`.

    There, cores feed the GPU.

    OMP_NUM_THREADS, if set, is the number on `cpu`: several trainings on one machine share its cores that way, where
    each with a thread per core would run many times slower.
    """
    import torch

    if device_type == "cpu":
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(wanted) if wanted.isdecimal() and int(wanted) > 0 else usable_cpu_count())
    elif device_type == "cuda":
        torch.set_num_threads(1)
        try:
            torch.set_num_interop_threads(1)
        except RuntimeError as error:  # can be set once only, before any parallel work
            logger.debug("inter-op threads stay at %d: %s", torch.get_num_interop_threads(), error)


def usable_cpu_count() -> int:
    """Count the cores that this process may use.

    They can be fewer than the machine has (containers, schedulers).
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim not in formats:
        return tensor
    return tensor.contiguous(memory_format=formats[tensor.ndim])


def _cpu_has_amx() -> bool:
    import torch

    query = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not public, and not in every version
    return query is not None and bool(query())


def _read_cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def _cpu_flags_name_bf16(cpu_info: str) -> bool:
    return re.search(r"^flags\s*:.*\b(amx_bf16|avx512_bf16)\b", cpu_info, re.MULTILINE) is not None
