"""The command nnUNetv2_fed_check: a hospital's first day in a federation, within two minutes."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.utilities.command_line import dataset_argument, run_command

if TYPE_CHECKING:
    from nnunetv2.federated.privacy.disclosure import Disclosure
    from nnunetv2.federated.site.credential import SiteCredential
    from nnunetv2.site_check.findings import Finding
    from nnunetv2.site_check.forecast import Forecast
    from nnunetv2.site_check.line import Line

DATA_S = 25.0
"""In which cases are read, unless all of them are to be."""
TRIAL_S = 10.0
"""In which training steps are tried."""
DEFAULT_EPOCHS, DEFAULT_STEPS, DEFAULT_VALIDATION_STEPS = 1000, 250, 50
USUAL_BYTES = 125_000_000
"""Of the weights of a plain U-Net, where there are no plans yet."""
CHECKPOINT_COPIES = 6
"""Weights and momentum, of the best, the latest and the final network."""
BYTES_PER_COMPRESSED_BYTE = 4
"""Of preprocessed data, for each byte of compressed images; half of it where images are not compressed."""


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

    machine: list[Finding] = field(default_factory=list)
    line: list[Finding] = field(default_factory=list)
    data: list[Finding] = field(default_factory=list)
    permission: list[Finding] = field(default_factory=list)
    training: list[Finding] = field(default_factory=list)
    forecast: Forecast | None = None

    def findings(self) -> list[Finding]:
        """Return all of them in the order in which people read them."""
        return [*self.machine, *self.line, *self.data, *self.permission, *self.training]


@dataclass(frozen=True)
class _Site:
    """What is known of a dataset here."""

    name: str
    raw: Path
    preprocessed: Path
    documents: list[Disclosure]
    plans: dict[str, Any] | None
    dataset_json: dict[str, Any]
    configuration: str | None

    @property
    def update_bytes(self) -> int:
        """Return the size of the weights that travel each round."""
        return max((one.size for one in self.documents if one.kind == "update" and one.specs), default=USUAL_BYTES)


def run_checks(request: Request) -> Results:
    """Check everything that can be checked, whatever else is wrong."""
    from nnunetv2.site_check.machine import check_disk, check_folders

    results = Results()
    _add(results.machine, "machine", check_folders)
    credential = _load_credential(results)
    site: list[_Site] = []
    if request.dataset is not None:
        _add(results.data, "data", lambda: _check_dataset(request, credential, site))
    update_bytes = site[0].update_bytes if site else USUAL_BYTES
    may_send = True
    if credential is not None and site:
        may_send = _check_permission(results, site[0], credential)
    line = _check_line(results, credential, update_bytes, may_send=may_send)
    step_s = _check_training(results, request, site[0]) if site else None
    _add(results.machine, "machine", lambda: check_disk(_needed_bytes(site[0] if site else None, update_bytes)))
    if line is not None:
        _forecast(results, line, update_bytes, step_s)
    return results


def _add(findings: list[Finding], area: str, check: Callable[[], Iterable[Finding]]) -> None:
    """Add what a check finds; one that fails is a finding, and the others go on."""
    from nnunetv2.federated.errors import FederationError
    from nnunetv2.site_check.findings import Finding
    from nnunetv2.utilities.command_line import describe_error

    try:
        findings.extend(check())
    except (FederationError, ValueError, OSError, RuntimeError, ImportError, KeyError, TypeError) as error:
        sentence = f"This could not be checked: {describe_error(error)}"
        remedy = "Mend what the line names; if it names nothing, show it to the coordinating site."
        findings.append(Finding(area=area, name="not_checked", state="problem", sentence=sentence, remedy=remedy))


# ------------------------------------------------------------------------------------------------ one after another
def _load_credential(results: Results) -> SiteCredential | None:
    from nnunetv2.federated.errors import FederationError
    from nnunetv2.federated.site.credential import load_credential
    from nnunetv2.site_check.findings import Finding

    try:
        return load_credential()
    except FederationError as error:
        sentence, _, remedy = str(error).partition(". ")
        results.line.append(
            Finding(
                area="line",
                name="not_joined",
                state="problem",
                sentence=f"{sentence[:1].upper()}{sentence[1:]}.",
                remedy=f"{remedy or 'Join with nnUNetv2_fed_join and a new invitation'}.",
            )
        )
        return None


def _check_dataset(request: Request, credential: SiteCredential | None, site: list[_Site]) -> Iterable[Finding]:
    """Check the data of a site; what is known of it goes into `site`."""
    from nnunetv2.federated.commands.manifest import collect
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.site_check.dataset import check_data
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.device import usable_cpu_count
    from nnunetv2.utilities.json_files import PLANS, read_json

    name = maybe_convert_to_dataset_name(request.dataset if request.dataset is not None else "")
    raw, preprocessed = Path(nnUNet_raw.require()) / name, Path(nnUNet_preprocessed.require()) / name
    yield from check_data(
        raw, preprocessed, time_limit_s=None if request.all_cases else DATA_S, num_threads=usable_cpu_count()
    )
    dataset_json = read_json(raw / "dataset.json")
    plans_file = preprocessed / f"{request.plans}.json"
    plans = read_json(plans_file, required=PLANS) if plans_file.is_file() else None
    configuration = None if plans is None else _choose(request.configuration, plans, plans_file)
    documents = collect(
        name,
        [configuration] if configuration else [],
        trainer=request.trainer,
        plans_name=request.plans,
        share_extrema=request.share_extrema,
        precision=(credential.precision if credential else None) or "float32",
    )
    site.append(_Site(name, raw, preprocessed, documents, plans, dataset_json, configuration))


def _choose(wanted: str | None, plans: dict[str, Any], file: Path) -> str:
    configurations = list(plans["configurations"])
    chosen = wanted or ("3d_fullres" if "3d_fullres" in configurations else configurations[0])
    if chosen not in configurations:
        raise ValueError(f"{file} has no configuration {chosen}, only {', '.join(configurations)}")
    return chosen


def _check_permission(results: Results, site: _Site, credential: SiteCredential) -> bool:
    """Ask the allow-list; return whether it is for this coordinator, so that a dummy round may go there."""
    from nnunetv2.federated.errors import FederationError
    from nnunetv2.federated.privacy.allow_list import load_allow_list
    from nnunetv2.site_check.permission import check_permission

    _add(results.permission, "permission", lambda: [check_permission(site.documents, url=credential.url)])
    try:
        allow = load_allow_list()
    except FederationError:
        return False
    return allow is None or allow.coordinator in (None, credential.url)


def _check_line(
    results: Results, credential: SiteCredential | None, update_bytes: int, *, may_send: bool
) -> Line | None:
    from nnunetv2.site_check.line import check_line

    if credential is None:
        return None
    lines: list[Line] = []

    def check() -> Iterable[Finding]:
        lines.append(check_line(credential, update_bytes, may_send=may_send))
        return lines[0].findings

    _add(results.line, "line", check)
    return lines[0] if lines else None


def _check_training(results: Results, request: Request, site: _Site) -> float | None:
    """Check the plans against the GPU; return the seconds of a training step, if they were measured."""
    from nnunetv2.site_check.findings import Finding
    from nnunetv2.site_check.memory import check_given_memory, check_trial, estimate_gb, try_steps

    if site.plans is None or site.configuration is None:
        sentence = f"There are no plans {request.plans} of {site.name} yet: GPU and weights are not looked at."
        remedy = f"nnUNetv2_plan_and_preprocess -d {site.name} --federated, with the other sites; then check again."
        results.training.append(
            Finding(area="training", name="no_plans", state="note", sentence=sentence, remedy=remedy)
        )
        return None
    plans, name, seconds = site.plans, site.configuration, list[float]()

    def check() -> Iterable[Finding]:
        from nnunetv2.plans.plans_manager import PlansManager, determine_num_input_channels

        manager = PlansManager(plans)
        description = manager.get_configuration(name)
        needed_gb = estimate_gb(
            description.configuration,
            num_inputs=determine_num_input_channels(manager, description, site.dataset_json),
            num_outputs=manager.get_label_manager(site.dataset_json).num_segmentation_heads,
        )
        if request.gpu_memory_gb is not None:
            yield check_given_memory(name, needed_gb, request.gpu_memory_gb)
            return
        trial = try_steps(plans, site.dataset_json, name, device=request.device, limit_s=TRIAL_S)
        if trial.step_s is not None:
            seconds.append(trial.step_s)
        yield check_trial(name, needed_gb, trial)

    _add(results.training, "training", check)
    return seconds[0] if seconds else None


def _needed_bytes(site: _Site | None, update_bytes: int) -> dict[str, int]:
    """Estimate what is still to be written, per environment variable."""
    needed = {"nnUNet_results": CHECKPOINT_COPIES * update_bytes, "tmp": 2 * update_bytes}
    images = site.raw / "imagesTr" if site is not None else None
    if images is not None and images.is_dir():
        folder = (
            site.preprocessed / site.plans["configurations"][site.configuration].get("data_identifier", "")
            if site is not None and site.plans is not None and site.configuration is not None
            else images / "none"
        )
        present = {file.stem for file in folder.glob("*.pkl")} if folder.is_dir() else set()
        files = [file for file in images.iterdir() if file.is_file()]
        of_open_cases = [file for file in files if not any(file.name.startswith(f"{case}_") for case in present)]
        needed["nnUNet_preprocessed"] = sum(
            file.stat().st_size * BYTES_PER_COMPRESSED_BYTE // (1 if file.suffix == ".gz" else 2)
            for file in of_open_cases
        )
    return needed


def _forecast(results: Results, line: Line, update_bytes: int, step_s: float | None) -> None:
    """Compute hours and gigabytes from what was measured."""
    from nnunetv2.site_check.forecast import Forecast, check_speed, training_seconds

    settings = line.settings
    if settings is None:
        return
    transfer_s = None
    if line.up is not None and line.down is not None:
        transfer_s = update_bytes / line.up.bytes_per_s + update_bytes / line.down.bytes_per_s
    training_s = None
    if step_s is not None:
        training_s = training_seconds(
            step_s,
            num_steps=settings.num_iterations_per_epoch or DEFAULT_STEPS,
            num_validation_steps=settings.num_val_iterations_per_epoch or DEFAULT_VALIDATION_STEPS,
        )
    results.forecast = Forecast(
        rounds=settings.num_epochs or DEFAULT_EPOCHS,
        update_bytes=update_bytes,
        transfer_s=transfer_s,
        training_s=training_s,
    )
    slow = check_speed(results.forecast)
    if slow is not None:
        results.line.append(slow)


# ------------------------------------------------------------------------------------------------ command line
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_check`."""
    parser = argparse.ArgumentParser(
        description="Check within two minutes whether this site can take part in a federation: line, machine, data, "
        "permission, GPU. A dummy round of bytes without content measures the line; nothing of the data leaves. "
        "Ends with status 1 if something is in the way."
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        nargs="?",
        type=dataset_argument,
        help="number or name of the dataset; without it, neither data nor plans are looked at",
    )
    parser.add_argument(
        "configuration",
        metavar="CONFIGURATION",
        nargs="?",
        help="what is to be trained; default: 3d_fullres if the plans have it, else their first one",
    )
    parser.add_argument("-p", default="nnUNetPlans", metavar="NAME", help="plans (default: %(default)s)")
    parser.add_argument(
        "-tr", default="nnUNetTrainerAsymFedAvg", metavar="CLASS", help="trainer (default: %(default)s)"
    )
    parser.add_argument(
        "-device", default="cuda", choices=("cuda", "cpu"), help="where the network will run (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu_memory",
        type=_gigabytes,
        metavar="GB",
        help="memory of the GPU that will train, if that is in another machine; nothing is tried then",
    )
    parser.add_argument(
        "--share_extrema", action="store_true", help="as if planned with --share_extrema, for the allow-list"
    )
    parser.add_argument("--all_cases", action="store_true", help=f"read all cases, not only for {DATA_S:.0f} s")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    return parser


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of gigabytes, such as 24")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_check`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.site_check.findings import describe, has_problem, to_json
    from nnunetv2.utilities.plain_text import printable_json, show

    begun = time.monotonic()
    request = Request(
        dataset=arguments.dataset,
        configuration=arguments.configuration,
        plans=arguments.p,
        trainer=arguments.tr,
        share_extrema=arguments.share_extrema,
        gpu_memory_gb=arguments.gpu_memory,
        device=arguments.device,
        all_cases=arguments.all_cases,
    )
    with contextlib.redirect_stdout(sys.stderr):  # the list alone is the result
        results = run_checks(request)
    findings, forecast, seconds = results.findings(), results.forecast, time.monotonic() - begun
    if arguments.json:
        content = to_json(findings, forecast.as_json() if forecast else {}, seconds=seconds)
        show(*printable_json(content, indent=4).split("\n"))
    else:
        show(*describe(findings, list(forecast.lines()) if forecast else [], seconds=seconds))
    return int(has_problem(findings))


def check_entry() -> None:
    """Entry point of the console script `nnUNetv2_fed_check`."""
    run_command(main)
