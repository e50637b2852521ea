"""Describe the wishes of a job, and the permissions of server and sites.

    local/nnunet_server.json   at the server: where federations are kept
    local/nnunet_site.json     at a site: its dataset, its folders and its permissions for jobs
    in a job                   a federation, its settings, and the steps that the sites take

A job names no path, no command and no dataset; unknown keys are refused before anything starts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from nnunetv2.federated.coordinator.founding import check_settings, with_implied
from nnunetv2.federated.engine.commands import environment_of
from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.messages import SITE_PATTERN, JsonObject, Part, Segment
from nnunetv2.federated.protocol.rounds import DEFAULT_EPOCHS
from nnunetv2.federated.protocol.strict_json import canonical_json, decode_json, validated

SERVER_FILE = "nnunet_server.json"
SITE_FILE = "nnunet_site.json"
DEFAULT_TRAINER = "nnUNetTrainerAsymFedAvg"

File = TypeVar("File", "ServerFile", "SiteFile")
Task = TypeVar("Task", "CoordinatorTask", "SiteTask")
Step = Literal["plan", "train"]
FederationName = Annotated[str, Field(pattern=SITE_PATTERN)]
"""Names folders at the server and at the sites."""
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$")]
Words = Annotated[tuple[Word, ...], Field(min_length=1, max_length=100)]
Options = Annotated[tuple[Annotated[str, Field(max_length=500)], ...], Field(max_length=100)]


def _check_absolute(text: str) -> str:
    if not Path(text).is_absolute():
        raise ValueError(f"{text!r:.200} is no absolute path")
    return text


AbsolutePath = Annotated[str, Field(max_length=4000), AfterValidator(_check_absolute)]


class CoordinatorTask(Part):
    """The part of a job that is the server's."""

    federation: FederationName
    settings: JsonObject = {}
    """Of a new federation, by the names in FederationSettings; of one that there is, they must be the same."""


class SiteTask(Part):
    """The part of a job that is the sites'."""

    federation: FederationName
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=2)] = ("plan", "train")
    configuration: Segment = "3d_fullres"
    fold: Segment = "0"
    trainer: Segment = DEFAULT_TRAINER


class ServerFile(Part):
    """The decisions of the server's operator."""

    version: Literal[1] = 1
    folder: AbsolutePath
    """Federations are kept in folders below, outside of the workspaces of jobs, which go when a job ends."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of this machine where operators find page and commands while a job runs; 0: any free one. None: nowhere."""


class SiteFile(Part):
    """The permissions of a site for jobs, with its dataset and folders."""

    version: Literal[1] = 1
    folder: AbsolutePath
    """Credential, identity and logs of each federation lie in folders below."""
    dataset: Word
    """Name or id."""
    environment: Annotated[
        dict[Annotated[str, Field(max_length=200)], Annotated[str, Field(max_length=4000)]], Field(max_length=200)
    ]
    """Variables of the commands, such as nnUNet_raw."""
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=2)] = ("plan", "train")
    """That a job may have this site take."""
    configurations: Words = ("3d_fullres",)
    folds: Words = ("0", "1", "2", "3", "4", "all")
    trainers: Words = (DEFAULT_TRAINER,)
    planning: Literal["ffe", "asym"] = "ffe"
    plans: Word = "nnUNetPlans"
    device: Literal["cuda", "cpu", "mps"] = "cuda"
    plan_options: Options = ()
    train_options: Options = ()
    """Further words for the two commands."""
    commands: AbsolutePath | None = None
    """Folder with the commands of this package. None: that of the engine's own Python."""
    attach: bool = False
    """The job opens the gateway only; people type the commands."""

    @property
    def commands_folder(self) -> Path:
        """The one folder whose commands a job may run."""
        return Path(self.commands or Path(sys.executable).parent)


def read_server_file(folder: Path) -> ServerFile:
    """Read the decisions of the server's operator from the folder `local` of its kit.

    Raises:
        FederationError: There is no such file, or it is not one.
    """
    command = "nnUNetv2_fed_engine server --kit KIT --folder FOLDER"
    return _read(ServerFile, folder / SERVER_FILE, f"the operator of the server writes it with {command}")


def read_site_file(folder: Path) -> SiteFile:
    """Read the permissions of a site from the folder `local` of its kit.

    Raises:
        FederationError: There is no such file, or it is not one.
    """
    command = "nnUNetv2_fed_engine site --kit KIT --dataset ID --folder FOLDER"
    return _read(SiteFile, folder / SITE_FILE, f"people at the site write it with {command}")


def _read(model: type[File], path: Path, remedy: str) -> File:
    try:
        return decode_json(model, path.read_bytes())
    except FileNotFoundError:
        raise FederationError(f"{path} is missing: {remedy}") from None
    except (OSError, WireError) as error:
        raise FederationError(f"{path} cannot be used: {error}. {remedy[0].upper()}{remedy[1:]}") from error


def parse_task(model: type[Task], task: object) -> Task:
    """Check the part of a job that its configuration holds.

    Raises:
        FederationError: It has other keys or values than jobs have.
    """
    try:
        return decode_json(model, canonical_json(task))
    except (TypeError, ValueError) as error:
        raise FederationError(
            f"the job is none that nnUNetv2_fed_engine job has written for this version: {error}"
        ) from error


def settings_of_task(task: CoordinatorTask, sites: tuple[str, ...]) -> FederationSettings:
    """Return the settings of a new federation.

    Raises:
        FederationError: They contradict each other, or a job must not choose one of them.
    """
    check_given(task)
    secure = task.settings.get("secure")
    given = with_implied(dict(task.settings), k=secure.get("k") if isinstance(secure, dict) else None)
    values = {"num_epochs": DEFAULT_EPOCHS, **given, "federation": task.federation, "sites": list(sites)}
    settings = validated(
        lambda: FederationSettings.model_validate_json(canonical_json(values), strict=True), "the settings of the job"
    )
    check_settings(settings)
    return settings


def given_of_task(task: CoordinatorTask) -> dict[str, object]:
    """Return the settings of a job, to be compared with those in force.

    Raises:
        FederationError: They are no settings.
    """
    values = {**task.settings, "federation": task.federation, "sites": []}
    settings = validated(
        lambda: FederationSettings.model_validate_json(canonical_json(values), strict=True), "the settings of the job"
    )
    given = {name: getattr(settings, name) for name in task.settings}
    if settings.secure is not None and "secure" in given:
        given["geometry"] = settings.secure.geometry
    return given


def check_given(task: CoordinatorTask) -> None:
    """Raise FederationError if a job gives settings that it must not."""
    for name in ("federation", "sites", "initial_weights"):
        if name in task.settings:
            raise FederationError(f"a job must not choose {name}: leave it out of its settings")


def check_allowed(task: SiteTask, site: SiteFile, file: Path) -> None:
    """Raise FederationError unless a site allows the task of a job."""
    for what, wanted, allowed in (
        *(("step", step, site.steps) for step in task.steps),
        ("configuration", task.configuration, site.configurations),
        ("fold", task.fold, site.folds),
        ("trainer", task.trainer, site.trainers),
    ):
        if wanted not in allowed:
            raise FederationError(
                f"the job wants {what} {wanted}, this site allows {', '.join(allowed)}: {file} says so, and people of "
                "the site may change it"
            )


def commands_of(task: SiteTask, site: SiteFile) -> list[list[str]]:
    """Return the commands of a site for a job, in their order."""
    commands = {
        "plan": [
            "nnUNetv2_plan_and_preprocess",
            *("-d", site.dataset, "--federated", site.planning, "-c", task.configuration),
            *(() if site.plans == "nnUNetPlans" else ("-overwrite_plans_name", site.plans)),
            *site.plan_options,
        ],
        "train": [
            "nnUNetv2_train",
            *(site.dataset, task.configuration, task.fold, "-tr", task.trainer, "-p", site.plans),
            *("-device", site.device, *site.train_options),
            *(("--c",) if has_begun(task, site) else ()),
        ],
    }
    return [commands[step] for step in ("plan", "train") if step in task.steps]


def has_begun(task: SiteTask, site: SiteFile) -> bool:
    """Return whether a training of this site has left a checkpoint to go on from."""
    results = environment_of(site.environment, Path(site.folder)).get("nnUNet_results")  # where the command looks
    if not results:
        return False
    dataset = f"Dataset{int(site.dataset):03d}_*" if site.dataset.isdecimal() else site.dataset
    model = f"{task.trainer}__{site.plans}__{task.configuration}/fold_{task.fold}"
    names = ("checkpoint_latest.pth", "checkpoint_final.pth")
    return any(next(Path(results).glob(f"{dataset}/{model}/{name}"), None) is not None for name in names)
