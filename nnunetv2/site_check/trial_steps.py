"""Train a few steps on random data in their own process, and measure them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from nnunetv2.models.network_from_plans import get_network_from_plans
from nnunetv2.models.networks import speed_up_on_cpu_
from nnunetv2.plans.plans_manager import PlansManager, determine_num_input_channels
from nnunetv2.utilities.device import autocast_context
from nnunetv2.utilities.plain_text import show

MOST_STEPS = 6
"""The first of them is slow, and does not count where there are others."""


def main() -> None:
    """Read the task from standard input and print the result to standard output, both JSON."""
    task = json.load(sys.stdin)
    wants_gpu = task["device"] == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda" if wants_gpu else "cpu")
    result: dict[str, Any] = {"device": "cpu"}
    if wants_gpu:
        properties = torch.cuda.get_device_properties(0)
        result = {"device": properties.name, "total_gb": properties.total_memory / 1e9}
    try:
        result["step_s"] = measure(
            task["plans"], task["dataset_json"], task["configuration"], device, limit_s=task["limit_s"]
        )
    except torch.OutOfMemoryError:
        result["failure"] = "its memory is too small"
    except RuntimeError as error:
        result["failure"] = " ".join(str(error).split())[:300]
    if wants_gpu:
        result["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
    show(json.dumps(result))


def measure(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    device: torch.device,
    *,
    limit_s: float,
) -> float:
    """Return the seconds that a training step takes: forward, loss, backward, optimizer."""
    manager = PlansManager(dict(plans))
    description, labels = manager.get_configuration(configuration), manager.get_label_manager(dict(dataset_json))
    num_inputs = determine_num_input_channels(manager, description, dataset_json)
    network = get_network_from_plans(
        description.network_arch_class_name,
        description.network_arch_init_kwargs,
        description.network_arch_init_kwargs_req_import,
        num_inputs,
        labels.num_segmentation_heads,
        deep_supervision=True,
    ).to(device)
    speed_up_on_cpu_(network, device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, momentum=0.99, nesterov=True)
    scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
    batch = torch.randn(description.batch_size, num_inputs, *description.patch_size, device=device)
    durations: list[float] = []
    begun = time.monotonic()
    while len(durations) < MOST_STEPS and (not durations or time.monotonic() - begun < limit_s):
        before = time.monotonic()
        optimizer.zero_grad(set_to_none=True)
        with autocast_context(device):
            loss = sum((output.float() ** 2).mean() for output in network(batch))
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            torch.cuda.synchronize()
        durations.append(time.monotonic() - before)
    counted = durations[1:] or durations
    return sum(counted) / len(counted)


if __name__ == "__main__":
    main()
