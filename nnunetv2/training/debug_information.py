"""Describe a trainer and the machine it runs on, for debug.json."""

from __future__ import annotations

import socket
from typing import Any

import torch

_LOADER_PARTS = ("generator", "generator.transforms", "num_processes", "transform")


def describe_trainer(trainer: Any) -> dict[str, str | int]:
    """Return a trainer's attributes as text, name -> value.

    Methods are left out; of the network only its class is told.
    """
    described = {}
    for name in dir(trainer):
        if name.startswith("__"):
            continue
        try:
            value = getattr(trainer, name)
        except Exception as error:  # noqa: BLE001  a property of somebody's trainer may fail before training
            value = f"unavailable: {error!r}"
        if not callable(value) or name == "loss":
            described[name] = str(value)
    described["network"] = type(getattr(trainer, "network", None)).__name__
    for name in ("dataloader_train", "dataloader_val"):
        described.update(_describe_loader(name, getattr(trainer, name, None)))
    return {**described, **_describe_machine(trainer.device)}


def _describe_loader(name: str, loader: object) -> dict[str, str]:
    described = {}
    for part in _LOADER_PARTS:
        value = loader
        for attribute in part.split("."):
            value = getattr(value, attribute, None)
        if value is not None:
            described[f"{name}.{part}"] = str(value)
    return described


def _describe_machine(device: torch.device) -> dict[str, str | int]:
    described = {"hostname": socket.gethostname(), "torch_version": torch.__version__, "device": str(device)}
    if device.type != "cuda":
        return {**described, "cudnn_version": "None"}
    return {**described, "cudnn_version": torch.backends.cudnn.version(), "gpu_name": torch.cuda.get_device_name()}
