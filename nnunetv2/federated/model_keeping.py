"""Turn the last aggregate of a run into a model folder that `nnUNetv2_predict` loads.

    <folder>/<trainer>__<plans>__<configuration>/
        plans.json  dataset.json  dataset_fingerprint.json (if the sites pooled one)
        fold_<fold>/checkpoint_final.pth

That needs the same plans at all sites and every tensor of the network shared; else the aggregate stays what it is.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.federated.bodies import FederationSettings
from nnunetv2.federated.checkpoint_file import model_checkpoint, parameter_names, write_checkpoint
from nnunetv2.federated.closing import Archive, agree_on_plans
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.messages import FINE_KEY, Registration, registration_key, round_key
from nnunetv2.federated.wire import Document
from nnunetv2.utilities.atomic_write import save_json_atomically

TRAINER = "nnUNetTrainer"
"""Class that loads the model, also where the federated trainers are not known."""


def keep_model(run: str, folder: Path, settings: FederationSettings, archive: Archive) -> str:
    """Write the model folder of a complete run, and say in one line where it is or why there is none."""
    last = round_key(run, settings.num_epochs - 1)
    registrations: dict[str, Registration] = archive.messages(registration_key(run))
    site, registration = next(iter(registrations.items()))
    unavailable = f"no model folder is written, the last aggregate is {archive.result_path(last)}: "
    try:
        agree_on_plans({name: message.plans for name, message in registrations.items()})
    except RefusedError as error:
        return unavailable + error.message
    shared = archive.agreement(run).match.shared
    canonical = {sites[site]: name for name, sites in shared.items() if site in sites}
    try:
        names = parameter_names([entry.name for entry in registration.tensors], registration.aliases, canonical)
    except KeyError as error:
        return unavailable + f"tensor {error} of the network is not shared"
    with archive.result(last) as aggregate:
        return f"model written to {_write_model(folder, registrations, names, aggregate, archive, settings.num_epochs)}"


def _write_model(folder: Path, registrations: Mapping[str, Registration], names: Mapping[str, str],
                 aggregate: Document, archive: Archive, num_epochs: int) -> Path:
    registration = next(iter(registrations.values()))
    # All three are checked on receipt to be plain segments of a path.
    model = folder / f"{registration.trainer}__{registration.plans['plans_name']}__{registration.configuration}"
    fold_folder = model / f"fold_{registration.fold}"
    fold_folder.mkdir(parents=True, exist_ok=True)
    dataset_json = describe_dataset(registrations)
    save_json_atomically(registration.plans, model / "plans.json", sort_keys=False)
    save_json_atomically(dataset_json, model / "dataset.json", sort_keys=False)
    save_fingerprint(model / "dataset_fingerprint.json", archive)
    content = model_checkpoint(
        plans=registration.plans, configuration=registration.configuration, dataset_json=dataset_json,
        fold=registration.fold if registration.fold == "all" else int(registration.fold),
        mirroring_axes=common_mirroring_axes(registrations), current_epoch=num_epochs, trainer_name=TRAINER)
    write_checkpoint(fold_folder / "checkpoint_final.pth", aggregate, names, content)
    return model


def describe_dataset(registrations: Mapping[str, Registration]) -> dict[str, Any]:
    """Return what nnU-Net has to know of the data to use the model, as in dataset.json."""
    described = next(iter(registrations.values())).dataset_json.model_dump(mode="json", exclude_none=True)
    return {**described, "numTraining": sum(message.num_training_cases for message in registrations.values())}


def common_mirroring_axes(registrations: Mapping[str, Registration]) -> tuple[int, ...] | None:
    """Return the axes along which all sites have mirrored, and the model may be asked to."""
    axes = [message.mirroring_axes for message in registrations.values()]
    if any(one is None for one in axes):
        return None
    return tuple(sorted(set(axes[0]).intersection(*axes[1:])))


def save_fingerprint(path: Path, archive: Archive) -> None:
    """Write the pooled fingerprint beside the model, if this federation has made one."""
    if archive.is_closed(FINE_KEY):
        with archive.result(FINE_KEY) as document:
            save_json_atomically(document.message.fingerprint, path)
