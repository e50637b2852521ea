"""Check a site's part in a federation, from its folders to its GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.allow_list import load_allow_list
from nnunetv2.federated.site.credential import SiteCredential, load_credential
from nnunetv2.plans.plans_manager import PlansManager, determine_num_input_channels
from nnunetv2.site_check.dataset import check_data
from nnunetv2.site_check.findings import Finding
from nnunetv2.site_check.forecast import Forecast, check_speed, training_seconds
from nnunetv2.site_check.line import Line, check_line
from nnunetv2.site_check.machine import check_disk, check_folders
from nnunetv2.site_check.memory import check_given_memory, check_trial, estimate_gb, try_steps
from nnunetv2.site_check.permission import check_permission
from nnunetv2.site_check.planned_training import (
    USUAL_BYTES,
    DatasetFolders,
    PlannedTraining,
    find_folders,
    load_planned_training,
)
from nnunetv2.utilities.command_line import describe_error
from nnunetv2.utilities.device import usable_cpu_count

T = TypeVar("T")

DATA_S = 25.0
"""In which cases are read, unless all of them are to be."""
TRIAL_S = 10.0
"""In which training steps are tried."""
DEFAULT_EPOCHS, DEFAULT_STEPS, DEFAULT_VALIDATION_STEPS = 1000, 250, 50
CHECKPOINT_COPIES = 6
"""Weights and momentum, of the best, the latest and the final network."""
AREAS = ("machine", "line", "data", "permission", "training")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The scope of a check."""

    dataset: int | str | None = None
    """None: neither data nor plans are looked at."""
    configuration: str | None = None
    """None: 3d_fullres if the plans have it, else their first one."""
    plans: str = "nnUNetPlans"
    trainer: str = "nnUNetTrainerAsymFedAvg"
    share_extrema: bool = False
    gpu_memory_gb: float | None = None
    """Of the GPU that will train, if that is another one than here."""
    device: str = "cuda"
    all_cases: bool = False


@dataclass
class Results:
    """The findings so far, by area, and the forecast."""

    by_area: dict[str, list[Finding]] = field(default_factory=lambda: {area: [] for area in AREAS})
    forecast: Forecast | None = None

    @property
    def findings(self) -> list[Finding]:
        """Return all of them in the order in which people read them."""
        return [finding for area in AREAS for finding in self.by_area[area]]

    def add(self, area: str, check: Callable[[], Iterable[Finding]]) -> None:
        """Add the findings of a check."""
        self.by_area[area] += self.obtain(area, lambda: list(check())) or []

    def obtain(self, area: str, function: Callable[[], T]) -> T | None:
        """Return the result of a function, or None with a finding if it fails."""
        try:
            return function()
        except Exception as error:  # noqa: BLE001  the other checks are to be told, whatever fails here
            self.by_area[area].append(
                Finding(
                    area=area,
                    name="not_checked",
                    state="problem",
                    sentence=f"This could not be checked: {_in_words(error)}",
                    remedy="Mend what the line names; if it names nothing, show it to the coordinating site.",
                )
            )
            return None


def run_checks(request: Request) -> Results:
    """Check everything that can be checked."""
    results = Results()
    results.add("machine", check_folders)
    credential = _load_credential(results)
    training = None if request.dataset is None else _check_dataset(results, request, credential)
    update_bytes = USUAL_BYTES if training is None else training.update_bytes
    line = None
    if credential is not None:
        may_send = training is None or _check_permission(results, training, credential)
        line = results.obtain("line", lambda: check_line(credential, update_bytes, may_send=may_send))
    step_s = None if training is None else _check_gpu(results, request, training)
    needed = {
        "nnUNet_preprocessed": 0 if training is None else training.estimate_missing_bytes(),
        "nnUNet_results": CHECKPOINT_COPIES * update_bytes,
        "tmp": 2 * update_bytes,
    }
    results.add("machine", lambda: check_disk(needed))
    if line is not None:
        results.by_area["line"] += line.findings
        results.forecast = _forecast(line, update_bytes, step_s)
        results.add("line", lambda: check_speed(results.forecast))
    return results


def _in_words(error: Exception) -> str:
    """Return an error with its type, without which the message of a lookup is a mere name."""
    text = describe_error(error)
    return f"{type(error).__name__}: {text}" if isinstance(error, (LookupError, TypeError, AttributeError)) else text


def _load_credential(results: Results) -> SiteCredential | None:
    try:
        return load_credential()
    except FederationError as error:
        sentence, _, remedy = str(error).partition(". ")
        results.by_area["line"].append(
            Finding(
                area="line",
                name="not_joined",
                state="problem",
                sentence=f"{sentence[:1].upper()}{sentence[1:]}.",
                remedy=f"{remedy or 'Join with nnUNetv2_fed_join and a new invitation'}.",
            )
        )
        return None


def _check_dataset(results: Results, request: Request, credential: SiteCredential | None) -> PlannedTraining | None:
    """Check the data; return the planned training, if they can be understood."""
    folders = results.obtain("data", lambda: find_folders(request.dataset or ""))
    if folders is None:
        return None
    results.add("data", lambda: _check_data(folders, request))
    if any(finding.name == "dataset" for finding in results.by_area["data"]):
        return None
    return results.obtain(
        "training",
        lambda: load_planned_training(
            folders,
            request.configuration,
            plans_name=request.plans,
            trainer=request.trainer,
            share_extrema=request.share_extrema,
            precision=(credential.precision if credential else None) or "float32",
            is_masked=credential is not None and credential.secure is not None,
            networks=(credential.networks if credential else None) or "equal",
        ),
    )


def _check_data(folders: DatasetFolders, request: Request) -> list[Finding]:
    time_limit_s = None if request.all_cases else DATA_S
    return check_data(
        folders.raw, folders.preprocessed, time_limit_s=time_limit_s, num_threads=max(2, usable_cpu_count())
    )


def _check_permission(results: Results, training: PlannedTraining, credential: SiteCredential) -> bool:
    """Ask the allow-list; return whether it is for this coordinator, so that a dummy round may go there."""
    results.add("permission", lambda: [check_permission(training.documents, url=credential.coordinator)])
    try:
        allow = load_allow_list()
    except FederationError:
        return False
    return allow is None or allow.coordinator in (None, credential.coordinator)


def _check_gpu(results: Results, request: Request, training: PlannedTraining) -> float | None:
    """Check the plans against the GPU; return the seconds of a training step, if they were measured."""
    plans, name = training.plans, training.configuration
    if plans is None or name is None:
        dataset = training.folders.name
        finding = Finding(
            area="training",
            name="no_plans",
            state="note",
            sentence=f"There are no plans {request.plans} of {dataset} yet: GPU and weights are not looked at.",
            remedy=f"nnUNetv2_plan_and_preprocess -d {dataset} --federated, with the other sites; then check again.",
        )
        results.by_area["training"].append(finding)
        return None
    needed_gb = results.obtain("training", lambda: _estimate_gb(training, name))
    if needed_gb is None:
        return None
    if request.gpu_memory_gb is not None:
        results.by_area["training"].append(check_given_memory(name, needed_gb, request.gpu_memory_gb))
        return None
    trial = results.obtain(
        "training", lambda: try_steps(plans, training.dataset_json, name, device=request.device, limit_s=TRIAL_S)
    )
    if trial is None:
        return None
    results.by_area["training"].append(check_trial(name, needed_gb, trial))
    return trial.step_s


def _estimate_gb(training: PlannedTraining, name: str) -> float:
    manager = PlansManager(dict(training.plans or {}))
    description, dataset_json = manager.get_configuration(name), dict(training.dataset_json)
    return estimate_gb(
        description.configuration,
        num_inputs=determine_num_input_channels(manager, description, dataset_json),
        num_outputs=manager.get_label_manager(dataset_json).num_segmentation_heads,
    )


def _forecast(line: Line, update_bytes: int, step_s: float | None) -> Forecast | None:
    """Compute hours and gigabytes from measurements; None for an unknown federation."""
    settings = line.settings
    if settings is None:
        return None
    transfer_s = training_s = None
    if line.up is not None and line.down is not None:
        transfer_s = update_bytes / line.up.bytes_per_s + update_bytes / line.down.bytes_per_s
    if step_s is not None:
        training_s = training_seconds(
            step_s,
            num_steps=settings.num_iterations_per_epoch or DEFAULT_STEPS,
            num_validation_steps=settings.num_val_iterations_per_epoch or DEFAULT_VALIDATION_STEPS,
        )
    return Forecast(
        rounds=settings.num_epochs or DEFAULT_EPOCHS,
        update_bytes=update_bytes,
        transfer_s=transfer_s,
        training_s=training_s,
    )
