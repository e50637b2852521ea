"""Write the description of a model into an ONNX file's metadata, and read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.json_files import DATASET, PLANS, kind_of

FORMAT = 1
"""Version of the keys and of their meaning. A reader takes its own and earlier ones."""
_PREFIX = "nnunetv2_"
_TEXTS = ("configuration", "trainer", "checkpoint", "fold", "version")


class OnnxFileError(RuntimeError):
    """An ONNX file is no model of this package, or cannot be run."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A trained model without its network."""

    plans: dict[str, Any]
    """The plans, with one configuration and without its architecture."""
    configuration: str
    dataset_json: dict[str, Any]
    """Channels, labels, regions and their order, file ending."""
    mirroring_axes: tuple[int, ...]
    """Spatial axes, counted from 0, along which mirrored copies are averaged."""
    trainer: str
    checkpoint: str
    fold: str
    version: str
    """Of the package that wrote the file."""

    def is_fold_of_same_model(self, other: ModelDescription) -> bool:
        """Tell whether the logits of two networks may be averaged.

        All that decides on them must be the same.
        """
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("plans", "configuration", "dataset_json", "mirroring_axes", "trainer")
        )


def encode_metadata(description: ModelDescription) -> dict[str, str]:
    """Return the entries of an ONNX file's metadata, texts and JSON."""
    values = {
        "format": str(FORMAT),
        **{name: getattr(description, name) for name in _TEXTS},
        "plans": json.dumps(description.plans),
        "dataset": json.dumps(description.dataset_json),
        "mirroring_axes": json.dumps(description.mirroring_axes),
    }
    return {f"{_PREFIX}{name}": value for name, value in values.items()}


def decode_metadata(metadata: Mapping[str, str], file: Path) -> ModelDescription:
    """Return the description in an ONNX file's metadata.

    Raises:
        OnnxFileError: It has none, one of a later format, or one that is damaged; the message names the file.
    """
    values = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    if "format" not in values:
        raise OnnxFileError(
            f"{file} does not say how its network is to be used: it has no metadata of nnU-Net. Export the trained "
            "model with nnUNetv2_export_onnx"
        )
    if values["format"] != str(FORMAT):
        raise OnnxFileError(
            f"{file} has metadata of format {values['format']!r}, written by version {values.get('version')!r}; this "
            f"version reads format {FORMAT}. Install the version that wrote the file, or export the model again"
        )
    missing = [name for name in (*_TEXTS, "plans", "dataset", "mirroring_axes") if name not in values]
    if missing:
        raise _damaged(file, f"{', '.join(_PREFIX + name for name in missing)} missing")
    plans, dataset_json = _read(values, "plans", dict, file), _read(values, "dataset", dict, file)
    for key, required, content in (("plans", PLANS, plans), ("dataset", DATASET, dataset_json)):
        for name, kind in required.items():
            if not isinstance(content.get(name), kind):
                raise _damaged(file, f"{_PREFIX}{key} lacks {name!r}")
    configuration = plans["configurations"].get(values["configuration"])
    if not isinstance(configuration, dict) or not isinstance(configuration.get("patch_size"), list):
        raise _damaged(file, f"{_PREFIX}plans lacks the configuration {values['configuration']!r}")
    axes = _read(values, "mirroring_axes", list, file)
    spatial = range(len(configuration["patch_size"]))
    if any(type(axis) is not int or axis not in spatial for axis in axes) or len(set(axes)) < len(axes):
        raise _damaged(file, f"{_PREFIX}mirroring_axes are {axes}")
    return ModelDescription(
        plans=plans, dataset_json=dataset_json, mirroring_axes=tuple(axes), **{name: values[name] for name in _TEXTS}
    )


def _read(values: Mapping[str, str], name: str, kind: type, file: Path) -> Any:
    try:
        content = json.loads(values[name])
    except (json.JSONDecodeError, RecursionError) as error:
        raise _damaged(file, f"{_PREFIX}{name} is no JSON") from error
    if not isinstance(content, kind):
        raise _damaged(file, f"{_PREFIX}{name} holds {kind_of(content)}")
    return content


def _damaged(file: Path, reason: str) -> OnnxFileError:
    return OnnxFileError(f"the metadata of {file} is damaged ({reason}). Export the model again")
