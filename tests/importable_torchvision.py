"""Let torchvision import where its compiled part does not fit torch, for tests of networks that do not compute with it.

The package index has torchvision built for CUDA only. Beside a CPU build of torch it does not load its operators and
then fails while it describes them. Networks from timm need nothing of it but its import. This is a double for tests:
users install the torchvision that belongs to their torch.
"""

from __future__ import annotations

MAKE_IMPORTABLE = """
import sys

import torch

try:
    import torchvision
except (AttributeError, RuntimeError):  # the first and every later failure
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
"""
"""Declares the operators that torchvision describes, if it cannot do so itself; also for other processes."""


def make_torchvision_importable() -> None:
    """Import torchvision, with operators declared for it where its own do not load."""
    exec(MAKE_IMPORTABLE, {})
