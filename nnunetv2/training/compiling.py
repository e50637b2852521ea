"""Decide whether to compile networks with torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

VARIABLE = "nnUNet_compile"


def wants_compilation(device: torch.device, report: Callable[..., None]) -> bool:
    """Tell whether to compile: on CUDA, unless the environment variable nnUNet_compile says no.

    Args:
        report: Takes a line if compiling was asked for where there is none.
    """
    choice = os.environ.get(VARIABLE)
    wanted = choice is None or choice.lower() in ("true", "1", "t")
    if device in (torch.device("cpu"), torch.device("mps")) or os.name == "nt":
        if choice is not None and wanted:
            place = "Windows" if os.name == "nt" else f"device {device}"
            report(f"INFO: {VARIABLE} is set, but there is no compiling on {place}")
        return False
    return wanted
