"""Gather dataset, plans and documents of the training that a site is to join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.federated.commands.manifest import collect
from nnunetv2.federated.privacy.disclosure import Disclosure
from nnunetv2.federated.protocol.messages import Networks, Precision
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.plans.partial_labels import ANNOTATED
from nnunetv2.plans.plans_manager import PlansManager
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.json_files import PLANS, read_json

USUAL_BYTES = 125_000_000
"""Of the weights of a plain U-Net, where there are no plans yet."""
BYTES_PER_COMPRESSED_BYTE = 4
"""Of preprocessed data, for each byte of compressed images; half of it where images are not compressed."""


@dataclass(frozen=True)
class DatasetFolders:
    """Where a dataset lies at this site."""

    name: str
    raw: Path
    preprocessed: Path
    """May not exist yet."""


@dataclass(frozen=True)
class PlannedTraining:
    """A training as far as it is planned."""

    folders: DatasetFolders
    dataset_json: Mapping[str, Any]
    plans: Mapping[str, Any] | None
    """None: there are none yet."""
    configuration: str | None
    documents: Sequence[Disclosure]
    """All that planning, and training if there are plans, will send."""

    @property
    def update_bytes(self) -> int:
        """Return the size of the weights that travel each round."""
        return max((one.size for one in self.documents if one.kind == "update" and one.specs), default=USUAL_BYTES)

    def estimate_missing_bytes(self) -> int:
        """Estimate the size of the preprocessed cases that are still to be written."""
        images, finished = self.folders.raw / "imagesTr", self._finished_cases()
        files = images.iterdir() if images.is_dir() else ()
        return sum(
            file.stat().st_size * BYTES_PER_COMPRESSED_BYTE // (1 if file.suffix == ".gz" else 2)
            for file in files
            if file.is_file() and file.name.rpartition("_")[0] not in finished
        )

    def _finished_cases(self) -> set[str]:
        if self.plans is None or self.configuration is None:
            return set()
        name = PlansManager(dict(self.plans)).get_configuration(self.configuration).data_identifier
        return {file.stem for file in (self.folders.preprocessed / name).glob("*.pkl")}


def find_folders(dataset: int | str) -> DatasetFolders:
    """Return the folders of a dataset, which need not exist.

    Raises:
        RuntimeError: An environment variable is not set, or no dataset has this number.
    """
    raw, preprocessed = Path(nnUNet_raw.require()), Path(nnUNet_preprocessed.require())
    name = maybe_convert_to_dataset_name(dataset)
    return DatasetFolders(name, raw / name, preprocessed / name)


def load_planned_training(
    folders: DatasetFolders,
    configuration: str | None,
    *,
    plans_name: str,
    trainer: str,
    share_extrema: bool,
    precision: Precision,
    is_masked: bool = False,
    networks: Networks = "equal",
) -> PlannedTraining:
    """Read dataset.json and the plans, and build the documents that will be sent.

    Args:
        configuration: None takes 3d_fullres if the plans have it, else their first one.
        is_masked: Whether the federation masks updates and statistics.
        networks: Whether all sites plan the same network, or each its own.

    Raises:
        ValueError: A file makes no sense, or the plans have no such configuration.
        FederationError: The trainer is none for federations.
    """
    file = folders.preprocessed / f"{plans_name}.json"
    plans = read_json(file, required=PLANS) if file.is_file() else None
    chosen = None if plans is None else _choose(configuration, list(plans["configurations"]), file)
    documents = collect(
        folders.name,
        [chosen] if chosen else [],
        trainer=trainer,
        plans_name=plans_name,
        share_extrema=share_extrema,
        precision=precision,
        is_masked=is_masked,
        networks=networks,
    )
    return PlannedTraining(folders, _read_description(folders), plans, chosen, documents)


def _read_description(folders: DatasetFolders) -> Mapping[str, Any]:
    """Return dataset.json; where it was planned with the classes of other sites too, with all of these."""
    planned = folders.preprocessed / "dataset.json"
    if planned.is_file() and ANNOTATED in (description := read_json(planned)):
        return description
    return read_json(folders.raw / "dataset.json")


def _choose(wanted: str | None, configurations: Sequence[str], file: Path) -> str:
    if not configurations:
        raise ValueError(f"{file} has no configurations: plan again")
    chosen = wanted or ("3d_fullres" if "3d_fullres" in configurations else configurations[0])
    if chosen not in configurations:
        raise ValueError(f"{file} has no configuration {chosen}, only {', '.join(configurations)}")
    return chosen
