"""Describe a trained model for prediction without torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from nnunetv2.inference.onnx.metadata import ModelDescription
from nnunetv2.models.model_folder import TrainedModel

_OF_DATASET = (
    "name",
    "description",
    "licence",
    "license",
    "reference",
    "release",
    "channel_names",
    "modality",
    "labels",
    "regions_class_order",
    "file_ending",
)
"""The keys of dataset.json that go along. The rest may tell of cases and paths."""
_RESAMPLING = ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities")
_ON_TORCH, _ON_ARRAYS = "resample_torch_fornnunet", "resample_data_or_seg_to_shape"


def describe_model(model: TrainedModel, configuration: str, *, fold: int | str, checkpoint: str) -> ModelDescription:
    """Return the description of a fold of a model.

    Raises:
        ValueError: The plans resample in a way that needs torch.
    """
    planned = {
        key: value
        for key, value in model.configuration_manager.configuration.items()
        if key not in ("architecture", "inherits_from")
    }
    plans = {**model.plans_manager.plans, "configurations": {configuration: resample_without_torch(planned)}}
    return ModelDescription(
        plans=plans,
        configuration=configuration,
        dataset_json={key: model.dataset_json[key] for key in _OF_DATASET if key in model.dataset_json},
        mirroring_axes=tuple(model.mirroring_axes or ()),
        trainer=model.trainer_name,
        checkpoint=checkpoint,
        fold=str(fold),
        version=version("nnunetv2"),
    )


def resample_without_torch(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with linear resampling on arrays in place of that on torch.

    Raises:
        ValueError: The plans ask torch for another interpolation.
    """
    changed = dict(configuration)
    for key in _RESAMPLING:
        if configuration[key] != _ON_TORCH:
            continue
        options = configuration[f"{key}_kwargs"]
        modes = (options.get("mode", "linear"), options.get("aniso_axis_mode", "nearest-exact"))
        if modes != ("linear", "nearest-exact"):
            raise ValueError(
                f"the plans resample with torch ({key}, modes {' and '.join(modes)}), which has no counterpart without "
                "it: only linear and nearest-exact have"
            )
        kept = ("is_seg", "force_separate_z", "separate_z_anisotropy_threshold")
        changed[key] = _ON_ARRAYS
        changed[f"{key}_kwargs"] = {
            "force_separate_z": None,  # the default on torch, but not on arrays
            **{name: options[name] for name in kept if name in options},
            "order": 1,
            "order_z": 0,
        }
    return changed
