"""Turn aggregates of a run into a model folder that `nnUNetv2_predict` loads.

    <folder>/<trainer>__<plans>__<configuration>/
        plans.json  dataset.json  dataset_fingerprint.json (if the sites pooled one)
        privacy.json (if sites have declared differential privacy of their trainings)
        fold_<fold>/checkpoint_final.pth  checkpoint_best.pth (if aggregates were validated)
    <folder>/<trainer>__<plans>__<configuration>.zip        the same, to be installed elsewhere

That needs the same plans and networks at all sites, and every tensor of the network shared; else there is
only the aggregate. Which of the two it will be is known, and told, when the sites have registered: see `outlook`.

Where sites have networks of their own, there is such a folder for every network that is shared whole, and one zip file
with all of them. Their plans are called after the network (`own_<digest>`), not as any site calls its own.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.federated.aggregation.head_rows import join_names
from nnunetv2.federated.coordinator.models.checkpoint_file import model_checkpoint, parameter_names, write_checkpoint
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.consistency import PLANS_OF_A_SITE, comparable_plans
from nnunetv2.federated.exchanges.declared_privacy import privacy_record
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.network_groups import find_networks, never_averaged
from nnunetv2.federated.exchanges.outlook import counters_of, foresee_model
from nnunetv2.federated.privacy.own_networks import OWN_PLANS, resolve
from nnunetv2.federated.protocol.api import NetworkOutlook
from nnunetv2.federated.protocol.keys import PlansKey, RoundKey
from nnunetv2.federated.protocol.messages import Match, Registration
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.utilities.atomic_write import replacing, save_json_atomically

SMALLEST_BATCH = 2
"""Batch size in plans of which nobody says with how large a batch to train on."""
FALLBACK_DATASET = "Dataset999_Federated"
"""Folder in the zip where the plans name no proper dataset."""


def keep_models(run: str, folder: Path, *, final: int, best: int | None, archive: DocumentReader) -> str:
    """Write the model folder of a run; return in one line where, or why none.

    Args:
        folder: Where model folders are kept.
        final: The last round that was closed; its aggregate becomes checkpoint_final.
        best: The round whose aggregate validated best, which becomes checkpoint_best; None if none was validated.
    """
    registrations = archive.registrations(run)
    site, registration = next(iter(registrations.items()))
    match = archive.agreement(run).match
    outlook = foresee_model(registrations.items(), match)
    if outlook.obstacle:
        return _no_model(run, final, archive, outlook.obstacle)
    names = names_of_site(site, registration, match)
    registration = registration.model_copy(update={"plans": plans_of_sites(registrations, archive)})
    registrations[site] = registration
    model = _write_model(
        run, folder, registrations, names, final=final, best=best, archive=archive, trainer=outlook.trainer
    )
    return f"model written to {model} and {_write_zip(model.with_name(f'{model.name}.zip'), [model], registration)}"


def keep_models_of_networks(
    run: str,
    folder: Path,
    *,
    final: int,
    best: int | None,
    archive: DocumentReader,
    rounds_until: Callable[[int], Collection[tuple[frozenset[str], int]]],
) -> str:
    """Write a model folder for every network that is shared whole; see `keep_models`.

    Of a network whose sites have left before all of it was averaged there is none: it would hold initial values.

    Args:
        rounds_until: Number of a round -> of it and those before, the sites, and the fewest that average a tensor.
    """
    registrations = archive.registrations(run)
    match = archive.agreement(run).match
    first = next(iter(registrations.values()))
    networks = [one for one in find_networks(registrations.items(), match) if not one.obstacle]
    if not networks:
        return _no_model(run, final, archive, "no network of any site is shared whole")
    models, lacking = [], []
    averaged = {number: rounds_until(number) for number in (final, best) if number is not None}
    for network in networks:
        described = _registrations_for(network, registrations)
        site, registration = next(iter(described.items()))
        names = names_of_site(site, registration, match)
        lacks = {number: never_averaged(match.received_by(site), match, rounds) for number, rounds in averaged.items()}
        if lacks[final]:
            lacking.append(f"none of {network.name}: no round had enough of the sites with tensor {lacks[final]}")
            continue
        models.append(
            _write_model(
                run,
                folder,
                described,
                names,
                final=final,
                best=None if best is None or lacks[best] else best,
                archive=archive,
                trainer=network.trainer,
            )
        )
    if not models:
        return _no_model(run, final, archive, "; ".join(lacking))
    together = folder / f"{first.trainer}__{OWN_PLANS}__{first.configuration}.zip"
    # With those of other folds, whose networks may be others.
    packed = sorted(
        path for path in folder.glob(f"{first.trainer}__{OWN_PLANS}_*__{first.configuration}") if path.is_dir()
    )
    where = ", ".join(map(str, models)) + (f" ({'; '.join(lacking)})" if lacking else "")
    return f"model written to {where} and {_write_zip(together, packed, first)}"


def _no_model(run: str, final: int, archive: DocumentReader, reason: str) -> str:
    """Say in one line that there is no model folder, why, and where the last aggregate is."""
    return f"no model folder is written, the last aggregate is {archive.result_path(RoundKey(run, final))}: {reason}"


def _registrations_for(network: NetworkOutlook, registrations: Mapping[str, Registration]) -> dict[str, Registration]:
    """Return all registrations, first that of a site of the network, which gets the plans of its common model."""
    # Of its sites, the one whose initial weights all have started from says how large a patch is.
    site = min(network.sites, key=lambda one: (-registrations[one].num_training_cases, one))
    plans = plans_of_network(registrations[site], registrations, network.name)
    others = {other: one for other, one in registrations.items() if other != site}
    return {site: registrations[site].model_copy(update={"plans": plans}), **others}


def names_of_site(site: str, registration: Registration, match: Match) -> dict[str, str | tuple[str, ...]]:
    """Return the shared parameters of a site's network.

    Each of their names -> canonical name, or those of its rows.
    """
    canonical = {local: name for name, local in match.received_by(site).items()}
    return join_names(
        parameter_names(
            [entry.name for entry in registration.tensors if entry.name in canonical], registration.aliases, canonical
        )
    )


def _write_model(
    run: str,
    folder: Path,
    registrations: Mapping[str, Registration],
    names: Mapping[str, str | tuple[str, ...]],
    *,
    final: int,
    best: int | None,
    archive: DocumentReader,
    trainer: str,
) -> Path:
    """Write one model folder, of the network of the first registration, and return it."""
    model = _write_description(folder, registrations, archive)
    fold = next(iter(registrations.values())).fold
    for name, number in (("checkpoint_final.pth", final), ("checkpoint_best.pth", best)):
        if number is not None:
            _write_checkpoint(
                model / f"fold_{fold}" / name, run, number, registrations, names, archive, trainer=trainer
            )
    return model


def name_of_zip(outcome: str) -> str:
    """Return the name of the zip file, by the line that `keep_models` returned.

    Raises:
        RefusedError: It has written none.
    """
    match = re.fullmatch(r"model written to .*[/\\]([^/\\]+\.zip)", outcome)
    if match is None:
        reason = without_values(outcome).partition(": ")[2]
        raise RefusedError(f"there is no model that everybody could use: {reason}", code="no_model")
    return match[1]


def without_values(outcome: str) -> str:
    """Return a line of `keep_models` without values of plans, which those of earlier versions quote."""
    return re.sub(r"(the plans differ): .* is (?!not the same ).*", r"\1", outcome, flags=re.DOTALL)


def _write_description(folder: Path, registrations: Mapping[str, Registration], archive: DocumentReader) -> Path:
    """Write the JSON files of a model folder and return the folder."""
    registration = next(iter(registrations.values()))
    # All three are checked on receipt to be plain segments of a path.
    model = folder / f"{registration.trainer}__{registration.plans['plans_name']}__{registration.configuration}"
    (model / f"fold_{registration.fold}").mkdir(parents=True, exist_ok=True)
    save_json_atomically(registration.plans, model / "plans.json", sort_keys=False)
    save_json_atomically(describe_dataset(registrations), model / "dataset.json", sort_keys=False)
    save_fingerprint(model / "dataset_fingerprint.json", archive)
    declared = privacy_record({site: message.privacy for site, message in registrations.items()})
    if declared is not None:
        save_json_atomically(declared, model / "privacy.json", sort_keys=False)
    return model


def _write_checkpoint(
    path: Path,
    run: str,
    number: int,
    registrations: Mapping[str, Registration],
    names: Mapping[str, str | tuple[str, ...]],
    archive: DocumentReader,
    *,
    trainer: str,
) -> None:
    """Write the aggregate of a round as a checkpoint.

    Args:
        trainer: Class that builds the network, which prediction finds by this name.
    """
    registration = next(iter(registrations.values()))
    dataset_json = describe_dataset(registrations)
    content = model_checkpoint(
        plans=registration.plans,
        configuration=registration.configuration,
        dataset_json=dataset_json,
        fold=registration.fold if registration.fold == "all" else int(registration.fold),
        mirroring_axes=common_mirroring_axes(registrations),
        current_epoch=_epochs_until(number, archive.agreement(run).match),
        trainer_name=trainer,
    )
    with archive.result(RoundKey(run, number)) as aggregate:
        write_checkpoint(path, aggregate, names, content, counters=counters_of(registration))


def _epochs_until(number: int, match: Match) -> int:
    """Return how many epochs the sites have trained when a round is over."""
    epochs = Rounds(match.exchange_every).first_epoch(number + 1)
    return epochs if match.num_epochs is None else min(epochs, match.num_epochs)


def _write_zip(path: Path, models: Sequence[Path], registration: Registration) -> Path:
    """Pack model folders, with all their folds, for nnUNetv2_install_pretrained_model_from_zip."""
    dataset = str(registration.plans.get("dataset_name", ""))
    place = dataset if re.fullmatch(r"Dataset[0-9]{3,}_[A-Za-z0-9_-]{1,100}", dataset) else FALLBACK_DATASET
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for model in models:
            for file in sorted(file for file in model.rglob("*") if file.suffix in (".json", ".pth")):
                archive.write(file, f"{place}/{model.name}/{file.relative_to(model).as_posix()}")
    return path


def describe_dataset(registrations: Mapping[str, Registration]) -> dict[str, Any]:
    """Return the dataset.json with which nnU-Net uses the model."""
    described = next(iter(registrations.values())).dataset_json.model_dump(
        mode="json", exclude_none=True, exclude={"annotated_labels"}
    )
    file_ending = of_most_sites(message.dataset_json.file_ending for message in registrations.values())
    return {
        **described,
        "file_ending": file_ending,
        "numTraining": sum(message.num_training_cases for message in registrations.values()),
    }


def common_mirroring_axes(registrations: Mapping[str, Registration]) -> tuple[int, ...] | None:
    """Return the axes along which all sites have mirrored."""
    axes = [set(one.mirroring_axes) for one in registrations.values() if one.mirroring_axes is not None]
    return tuple(sorted(set.intersection(*axes))) if len(axes) == len(registrations) else None


def plans_of_sites(registrations: Mapping[str, Registration], archive: DocumentReader) -> dict[str, Any]:
    """Return a run's plans as in the sites' files, if made together.

    Dataset name and image reader may differ between the sites, and are those of most sites.
    """
    plans = next(iter(registrations.values())).plans
    key = PlansKey(str(plans["plans_name"]))
    compared = archive.messages_of(key).values() if archive.is_closed(key) else ()
    agreed = comparable_plans(plans)
    made_together = next((one.plans for one in compared if comparable_plans(one.plans) == agreed), plans)
    return {**made_together, **_as_at_most_sites(registrations)}


def plans_of_network(
    registration: Registration, registrations: Mapping[str, Registration], name: str
) -> dict[str, Any]:
    """Return a common model's plans where sites have their own networks.

    They hold the configuration that was trained, and of a cascade the stage before. The batch size, which is each
    site's own and does not matter for prediction, is the smallest that nnU-Net takes.

    Args:
        registration: Of a site that has the network.
        name: Of the plans.
    """
    trained = resolve(registration.plans, registration.configuration)
    before = trained.get("previous_stage")
    described = {registration.configuration: trained}
    if isinstance(before, str):
        described[before] = resolve(registration.plans, before)
    configurations = {
        configuration: {**content, "data_identifier": f"{name}_{configuration}", "batch_size": SMALLEST_BATCH}
        for configuration, content in described.items()
    }
    return {
        **registration.plans,
        **_as_at_most_sites(registrations),
        "plans_name": name,
        "configurations": configurations,
    }


def _as_at_most_sites(registrations: Mapping[str, Registration]) -> dict[str, Any]:
    """Return the dataset name and image reader that most sites' plans have."""
    held = {
        field: [message.plans[field] for message in registrations.values() if field in message.plans]
        for field in PLANS_OF_A_SITE
    }
    return {field: of_most_sites(values) for field, values in held.items() if values}


def of_most_sites(values: Iterable[Any]) -> Any:
    """Return the most frequent JSON value; of several, the first site's.

    Args:
        values: One per site, in the order of the sites' names.
    """
    values = list(values)
    return max(values, key=values.count)


def save_fingerprint(path: Path, archive: DocumentReader) -> None:
    """Write the pooled fingerprint beside the model, if this federation has made one."""
    fingerprint = archive.pooled_fingerprint()
    if fingerprint is not None:
        save_json_atomically(fingerprint, path)
