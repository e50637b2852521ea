"""Describe a trained model in a folder; read network and weights from it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from nnunetv2.models import networks
from nnunetv2.models.checkpoint_file import load_checkpoint_file
from nnunetv2.plans.plans_manager import ConfigurationManager, PlansManager, determine_num_input_channels
from nnunetv2.utilities.atomic_write import copy_atomically, remove_leftovers, save_json_atomically
from nnunetv2.utilities.json_files import DATASET, PLANS, read_json
from nnunetv2.utilities.trusted_names import UntrustedNameError

logger = logging.getLogger(__name__)

Parameters = dict[str, Any]


@dataclass(frozen=True)
class TrainedModel:
    """The content of a model folder.

    The network has the parameters of the first fold.
    """

    network: nn.Module
    parameters: list[Parameters]
    """One state dict per fold."""
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    trainer_name: str
    mirroring_axes: tuple[int, ...] | None
    configuration_name: str


def find_folds(folder: str | os.PathLike[str], checkpoint_name: str) -> list[int]:
    """Return the numbers of the folds that have this checkpoint, ordered by folder name.

    `fold_all` does not count, nor do copies such as `fold_0_before`.
    """
    names = sorted(entry.name for entry in Path(folder).iterdir() if re.fullmatch("fold_[0-9]+", entry.name))
    return [int(name.removeprefix("fold_")) for name in names if (Path(folder) / name / checkpoint_name).is_file()]


def load_model_folder(
    folder: str | os.PathLike[str],
    folds: Iterable[int | str] | int | str | None,
    checkpoint_name: str,
    *,
    find_trainer: Callable[[str], type],
    fallback: Callable[[], type],
) -> TrainedModel:
    """Read a model folder.

    Args:
        folds: Fold numbers or "all", one or several. None: all that have the checkpoint.
        find_trainer: Trainer name -> class. Only its `build_network_architecture` is used.
        fallback: Returns the class in place of one that is not found: the standard one, whose network most custom
            trainers keep.

    Raises:
        FileNotFoundError: The folder, plans.json, dataset.json or a checkpoint is missing.
        RuntimeError: A checkpoint does not fit the network that the plans describe.
        UntrustedNameError: The plans name something that a file must not have called.
    """
    folder = Path(folder)
    dataset_json, plans = (
        read_json(folder / name, required=required, if_missing=f"{folder} is not a trained model: it has no {name}")
        for name, required in (("dataset.json", DATASET), ("plans.json", PLANS))
    )
    checkpoints = [_load_for_prediction(path) for path in _checkpoint_paths(folder, folds, checkpoint_name)]
    plans_manager = PlansManager(plans)
    configuration_name = checkpoints[0]["init_args"]["configuration"]
    configuration_manager = plans_manager.get_configuration(configuration_name)
    trainer_name = checkpoints[0]["trainer_name"]
    trainer_class = _find_trainer(
        find_trainer, trainer_name, fallback, builds_network="network_trainer" in checkpoints[0]
    )
    try:
        network = build_network(trainer_class, plans_manager, configuration_manager, dataset_json)
    except UntrustedNameError as error:
        raise UntrustedNameError(f"{folder / 'plans.json'}: {error}") from error
    parameters = [checkpoint["network_weights"] for checkpoint in checkpoints]
    try:
        network.load_state_dict(parameters[0])
    except RuntimeError as error:
        if trainer_class.__name__ == trainer_name:
            raise
        raise RuntimeError(
            f"{folder} does not fit the network of nnUNetTrainer. {_needs_code_of(trainer_name)}"
        ) from error
    return TrainedModel(
        network,
        parameters,
        plans_manager,
        configuration_manager,
        dataset_json,
        trainer_name,
        checkpoints[0].get("inference_allowed_mirroring_axes"),
        configuration_name,
    )


def _load_for_prediction(path: Path) -> dict[str, Any]:
    """Load a checkpoint without the states of its optimizer, which take as much memory as weights, or twice."""
    checkpoint = load_checkpoint_file(path, mmap=is_zipfile(path))
    checkpoint.pop("optimizer_state", None)
    _take_into_memory_(checkpoint["network_weights"])
    return checkpoint


def _take_into_memory_(weights: Parameters) -> None:
    """Copy weights out of their file, which others may change.

    The metadata of the state dict stay. Names of one tensor (networks of nnU-Net have up to four) share one copy.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, torch.Tensor):
            place = value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype
            if place not in copies:
                copies[place] = value.clone()
            weights[name] = copies[place]


def save_model_description(
    folder: str, plans: Mapping[str, Any], dataset_json: Mapping[str, Any], preprocessed_folder: str
) -> None:
    """Write plans, dataset description and fingerprint, which prediction needs besides the weights.

    Partial files that killed processes left there an hour ago or earlier are removed.

    Raises:
        FileNotFoundError: The dataset has no fingerprint.
    """
    fingerprint = Path(preprocessed_folder, "dataset_fingerprint.json")
    if not fingerprint.is_file():
        raise FileNotFoundError(f"{fingerprint} is missing: run nnUNetv2_extract_fingerprint for this dataset")
    base = Path(folder)
    remove_leftovers(base)  # of other folds, which hold locks of their own, maybe
    save_json_atomically(plans, base / "plans.json", sort_keys=False)
    save_json_atomically(dataset_json, base / "dataset.json", sort_keys=False)
    copy_atomically(fingerprint, base / fingerprint.name)


def build_network(
    trainer_class: type,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict[str, Any],
) -> nn.Module:
    """Build a trainer's network without deep supervision, with freshly initialised weights."""
    return networks.build_network(
        trainer_class.build_network_architecture,
        plans_manager=plans_manager,
        configuration_manager=configuration_manager,
        dataset_json=dataset_json,
        num_input_channels=determine_num_input_channels(plans_manager, configuration_manager, dataset_json),
        num_output_channels=plans_manager.get_label_manager(dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )


def _find_trainer(
    find_trainer: Callable[[str], type], name: str, fallback: Callable[[], type], *, builds_network: bool
) -> type:
    """Find a trainer's class, or fall back with a warning.

    Args:
        builds_network: The checkpoint says that this very class builds the network, as the coordinator's do. Another
            network may have the same weights, and would predict something else.

    Raises:
        RuntimeError: There is no such class, and it builds the network.
    """
    try:
        return find_trainer(name)
    except RuntimeError as error:
        if builds_network:
            raise RuntimeError(f"{error}. {_needs_code_of(name)}") from error
        standard = fallback()
        logger.warning(
            "%s. Building the network of %s instead; if the weights do not fit it, prediction "
            "needs the code of %s (a folder named by nnUNet_extTrainer may hold it)",
            error,
            standard.__name__,
            name,
        )
        return standard


def _needs_code_of(trainer: str) -> str:
    return f"Prediction needs the code of {trainer}, which builds the network: nnUNet_extTrainer names its folder"


def _checkpoint_paths(folder: Path, folds: Iterable[int | str] | int | str | None, checkpoint_name: str) -> list[Path]:
    if folds is None:
        folds = find_folds(folder, checkpoint_name)
    elif isinstance(folds, (str, int)):
        folds = [folds]
    paths = [folder / f"fold_{fold if fold == 'all' else int(fold)}" / checkpoint_name for fold in folds]
    if not paths:
        if (folder / "fold_all" / checkpoint_name).is_file():
            raise FileNotFoundError(f"{folder} has no {checkpoint_name} but that of fold all: name it (-f all)")
        raise FileNotFoundError(f"no fold in {folder} has a checkpoint named {checkpoint_name}")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"missing checkpoints: {', '.join(map(str, missing))}. Folds with a {checkpoint_name} in {folder}: "
            f"{_describe_folds(folder, checkpoint_name)}; name those you want (-f, or use_folds)"
        )
    return paths


def _describe_folds(folder: Path, checkpoint_name: str) -> str:
    names = sorted(path.parent.name for path in folder.glob(f"fold_*/{checkpoint_name}"))
    return ", ".join(name.removeprefix("fold_") for name in names) or "none"
