"""Change plans by a JSON merge patch.

For example to networks that a machine without GPU trains in minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_files import PLANS, read_json

_PER_STAGE = ("features_per_stage", "n_conv_per_stage", "n_blocks_per_stage", "kernel_sizes", "strides")


def merge_patch(target: object, patch: object) -> Any:
    """Return a JSON value changed by a merge patch (RFC 7396).

    Braces are merged, null removes, the rest replaces.
    """
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def patch_plans(file: Path, patch: Mapping[str, Any]) -> None:
    """Change a plans file.

    Lists with an entry per stage are cut to the number of stages, so that one patch serves networks of any depth.

    Raises:
        ValueError: The patch names a configuration that the plans do not have, or a list is too short for a network.
    """
    if not patch:
        return
    plans = read_json(file, required=PLANS)
    if unknown := sorted(set(patch.get("configurations", {})) - set(plans["configurations"])):
        raise ValueError(
            f"the patch of plans names the configuration {unknown[0]!r}, {file} has "
            f"{', '.join(sorted(plans['configurations']))}"
        )
    plans = merge_patch(plans, patch)
    for name, configuration in plans["configurations"].items():
        network = configuration.get("architecture", {}).get("arch_kwargs", {})
        for key in _PER_STAGE:
            if isinstance(network.get(key), list) and "n_stages" in network:
                if len(network[key]) < network["n_stages"]:
                    raise ValueError(
                        f"the patch of plans gives {len(network[key])} values of {key}, but the network of {name} in "
                        f"{file} has {network['n_stages']} stages: give as many as the deepest network has"
                    )
                network[key] = network[key][: network["n_stages"]]
    save_json_atomically(plans, file, sort_keys=False)
