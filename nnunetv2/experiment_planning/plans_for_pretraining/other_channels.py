"""Fit the plans of one dataset to another number of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.channel_normalization import choose_normalization

INTENSITIES = "foreground_intensity_properties_per_channel"


def adapt_channels(
    plans: Mapping[str, Any], *, old: Sequence[str], new: Sequence[str], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """Return plans for other channels.

    A channel with the name of an old one keeps its normalization and intensities, with which the network has learned.
    Those of the others are chosen and measured for the new dataset.

    Args:
        old: Names of the channels that the plans are for.
        new: Names of the channels of the new dataset.
        fingerprint: Of the new dataset.
    """
    chosen = choose_normalization(new, fingerprint["median_relative_size_after_cropping"])
    origins = [old.index(name) if name in old else None for name in new]
    measured, known = fingerprint[INTENSITIES], plans[INTENSITIES]
    intensities = {
        str(number): measured[str(number)] if origin is None else known[str(origin)]
        for number, origin in enumerate(origins)
    }

    def adapt(configuration: Mapping[str, Any]) -> dict[str, Any]:
        if "normalization_schemes" not in configuration:
            return dict(configuration)
        pairs = list(zip(configuration["normalization_schemes"], configuration["use_mask_for_norm"]))
        kept = [choice if origin is None else pairs[origin] for choice, origin in zip(chosen, origins)]
        return {
            **configuration,
            "normalization_schemes": [scheme for scheme, _ in kept],
            "use_mask_for_norm": [use_mask for _, use_mask in kept],
        }

    configurations = {name: adapt(configuration) for name, configuration in plans["configurations"].items()}
    return {**plans, "configurations": configurations, INTENSITIES: intensities}
