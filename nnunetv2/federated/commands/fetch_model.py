"""Fetch the model of a finished run as a zip file; install it on request.

For sites and operators. The content of the file is data: it is checked before anything of it is installed.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from nnunetv2.federated.commands.api_client import add_folder_option, operator_credential
from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.utilities.plain_text import shell_command, show

if TYPE_CHECKING:
    from nnunetv2.federated.protocol.api import RunState
    from nnunetv2.federated.site.transports.http import HttpTransport
    from nnunetv2.model_sharing.archive_check import ArchiveLimits


def fetch(transport: HttpTransport, run: str, target: Path) -> Path:
    """Download the model of a run to a zip file or folder; return the file.

    Raises:
        RefusedError: The run goes on, or the coordinator keeps no model of it.
        UnsafeArchiveError: The file does not look like a model export; it is removed.
        ValueError: Runs are not called so.
        WireError: The file is no zip file, or larger than nnUNet_max_model_gb or the disk allows.
    """
    from nnunetv2.federated.protocol.keys import RegistrationKey
    from nnunetv2.federated.site.results import largest_model
    from nnunetv2.model_sharing.archive_check import ArchiveLimits
    from nnunetv2.utilities.atomic_write import replacing

    RegistrationKey(run)  # raises for an invalid name; a valid one is safe as that of a file
    path = target if target.suffix == ".zip" else target / f"{run}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    limits = ArchiveLimits.from_environment()
    with replacing(path) as partial:
        transport.fetch_model(run, partial, largest=largest_model(path.parent))
        _check(partial, path, limits)
    return path


def _check(file: Path, path: Path, limits: ArchiveLimits) -> None:
    """Raise an error unless a zip file, bound for `path`, holds a model."""
    from nnunetv2.model_sharing.archive_check import check_archive

    try:
        with zipfile.ZipFile(file) as archive:
            archive.filename = str(path)  # which messages name
            check_archive(archive, None, limits)
    except zipfile.BadZipFile as error:
        raise WireError(
            f"what the coordinator sends as {path.name} is no zip file, or it is damaged: {error}"
        ) from error


def install(path: Path, *, replace: bool) -> str:
    """Install the models of a zip file below nnUNet_results; return their dataset.

    Args:
        replace: Give up files that are there already.

    Raises:
        FederationError: There are some, and they are to stay; or another dataset has the id. Nothing was written.
    """
    from nnunetv2.model_sharing.model_import import install_model_from_zip_file
    from nnunetv2.paths import nnUNet_results

    root, dataset = Path(nnUNet_results), local_dataset(path)
    present = [
        place for place in (root.joinpath(dataset, *name.parts[1:]) for name in checkpoints_in(path)) if place.exists()
    ]
    if present and not replace:
        raise FederationError(
            f"{present[0]} is there already, most likely from this site's own training. "
            f"--replace gives it up; {path} stays where it is"
        )
    install_model_from_zip_file(str(path), dataset_name=dataset)
    return dataset


def local_dataset(path: Path) -> str:
    """Return this site's name for the dataset of a model.

    That is the dataset with the plans of the model, which all its sites have; where there is none, the name that the
    zip file gives, if no other dataset has its id.

    Raises:
        FederationError: Another dataset has the id, or several have the plans.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    checkpoints = checkpoints_in(path)
    if not checkpoints:
        raise WireError(f"{path} is no model: it has no checkpoint")
    named = checkpoints[0].parts[0]
    own = _datasets_with_plans(path)
    if named in own or not own:
        number = re.match("Dataset([0-9]{3,})", named)
        others = set() if number is None else set(map(str, find_candidate_datasets(int(number[1])))) - {named}
        if number is not None and others and named not in own:
            raise FederationError(
                f"the model is of {named}, but here the id {int(number[1])} is that of {', '.join(sorted(others))}: "
                f"nothing was installed. {path} stays where it is; unpack it elsewhere, and predict with "
                "nnUNetv2_predict_from_modelfolder"
            )
        return named
    if len(own) > 1:
        raise FederationError(
            f"several datasets here have the plans of the model: {', '.join(sorted(own))}. Nothing "
            f"was installed; {path} stays where it is"
        )
    return own.pop()


def _datasets_with_plans(path: Path) -> set[str]:
    """Return this site's datasets that were planned or trained with a model's plans."""
    from nnunetv2.federated.exchanges.consistency import comparable_plans
    from nnunetv2.federated.exchanges.network_groups import DIGITS
    from nnunetv2.federated.privacy.own_networks import OWN_PLANS
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results

    model = checkpoints_in(path)[0].parent.parent
    plans = _plans_in(path, model)
    if re.fullmatch(rf"{OWN_PLANS}_[0-9a-f]{{{DIGITS}}}", plans["plans_name"]):  # the name of a network, no site's own
        return _datasets_that_agree(plans)
    for root, place in (
        (nnUNet_preprocessed, f"*/{plans['plans_name']}.json"),
        (nnUNet_results, f"*/{glob.escape(model.name)}/plans.json"),
    ):
        files = Path(str(root)).glob(place) if root.is_set() else ()
        found = {
            file.relative_to(str(root)).parts[0]
            for file in files
            if comparable_plans(json.loads(file.read_text(encoding="utf-8"))) == comparable_plans(plans)
        }
        if found:
            return found
    return set()


def _datasets_that_agree(plans: Mapping[str, Any]) -> set[str]:
    """Return this site's datasets whose plans agree with a model's in all that the data decide.

    Where sites have networks of their own, their plans are not those of a common model.
    """
    from nnunetv2.federated.exchanges.consistency import comparable_plans
    from nnunetv2.federated.privacy.own_networks import data_part
    from nnunetv2.paths import nnUNet_preprocessed

    agreed, found = comparable_plans(plans, "own"), set()
    files = sorted(Path(str(nnUNet_preprocessed)).glob("*/*.json")) if nnUNet_preprocessed.is_set() else ()
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue  # whatever it is, it is no plans
        if isinstance(content, dict) and "plans_name" in content:
            own = comparable_plans(content, "own")
            if data_part(own, agreed["configurations"]) == agreed:
                found.add(file.parent.name)
    return found


def _plans_in(path: Path, model: PurePosixPath) -> dict[str, Any]:
    """Read the plans of a model in a zip file; their name is part of paths that are looked for.

    Raises:
        WireError: There are none, or they are no plans.
    """
    from nnunetv2.federated.protocol.messages import MAX_DOCUMENT_JSON, SEGMENT_PATTERN
    from nnunetv2.federated.protocol.strict_json import parse_json

    name = f"{model}/plans.json"
    with zipfile.ZipFile(path) as archive:
        if name not in archive.namelist() or archive.getinfo(name).file_size > MAX_DOCUMENT_JSON:
            raise WireError(f"{path} is no model: it has no {name}, or a huge one")
        plans = parse_json(archive.read(name), what=f"{name} in {path}")
    if not isinstance(plans, dict):
        raise WireError(f"{path} is no model: its plans are no JSON object")
    plans_name = plans.get("plans_name")
    if not isinstance(plans_name, str) or not re.fullmatch(SEGMENT_PATTERN.strip("^$"), plans_name):
        raise WireError(f"{path} is no model: the plans in it are called {plans_name!s:.80}")
    return plans


def checkpoints_in(path: Path) -> list[PurePosixPath]:
    """Name the checkpoints in a zip file: `<dataset>/<trainer>__<plans>__<configuration>/fold_<fold>/<checkpoint>`."""
    with zipfile.ZipFile(path) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    return sorted(
        name
        for name in names
        if name.suffix == ".pth"
        and len(name.parts) == 4
        and name.parts[1].count("__") >= 2
        and name.parts[2].startswith("fold_")
    )


def describe_prediction(path: Path, dataset: str) -> Iterator[str]:
    """Yield the commands that predict with a zip file's models, one per checkpoint.

    Args:
        dataset: Name that the models are installed under.
    """
    folds: dict[tuple[str, str], list[str]] = {}
    for _, model, fold, checkpoint in (name.parts for name in checkpoints_in(path)):
        folds.setdefault((model, checkpoint), []).append(fold.removeprefix("fold_"))
    for (model, checkpoint), numbers in folds.items():
        trainer, *plans, configuration = model.split("__")
        yield shell_command(
            "nnUNetv2_predict",
            options=[
                ("-d", dataset),
                ("-c", configuration),
                *(("-f", number) for number in numbers),
                ("-tr", trainer),
                ("-p", "__".join(plans)),
                ("-chk", checkpoint),
                ("-i", "IMAGES"),
                ("-o", "PREDICTIONS"),
            ],
        )


def choose_run(runs: Sequence[RunState]) -> str | None:
    """Return the only run that is over; None if there are several.

    Raises:
        FederationError: There is none.
    """
    over = [state.run for state in runs if state.closed]
    if not over:
        going_on = ", ".join(f"{state.run} ({state.rounds_closed} rounds closed)" for state in runs) or "none"
        raise FederationError(f"no run is over yet. Runs: {going_on}")
    return over[0] if len(over) == 1 else None


# ---------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_fetch_model`."""
    parser = argparse.ArgumentParser(
        description="Fetch the model of a run that is over: the last average, and the best one by the Dice over all "
        "sites, as a zip file."
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="name of the run (default: the only one that is over; if there are several, list them)",
    )
    parser.add_argument(
        "-o",
        type=Path,
        default=Path(),
        metavar="FOLDER_OR_ZIP",
        help="where the file goes (default: RUN.zip in the current folder)",
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="install it in nnUNet_results, as nnUNetv2_install_pretrained_model_from_zip does",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="with --install: give up the checkpoints that are there, such as those of this site's own training",
    )
    add_folder_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_fetch_model`."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.replace and not arguments.install:
        parser.error("--replace needs --install")
    from nnunetv2.federated.site.transport import show_progress
    from nnunetv2.federated.site.transports.http import HttpTransport

    with HttpTransport(operator_credential(arguments.folder), report=show_progress) as transport:
        run = arguments.run
        if run is None:
            runs = transport.status().runs
            run = choose_run(runs)
        if run is None:
            show("Several runs are over; name one of them:")
            show(*(f"  {state.run}" for state in runs if state.closed))
            return 0
        path = fetch(transport, run, arguments.o)
    show(f"The model of run {run} is in {path}")
    if arguments.install:
        dataset = install(path, replace=arguments.replace)
        show(f"It is installed as a model of {dataset}. Predict with one of")
    else:
        try:
            dataset = local_dataset(path)
        except FederationError as error:
            show(f"It cannot be installed here: {error}")
            return 0
        # The dataset may have another name here than in the zip file.
        command = (
            shell_command("nnUNetv2_install_pretrained_model_from_zip", path)
            if dataset == checkpoints_in(path)[0].parts[0]
            else shell_command("nnUNetv2_fed_fetch_model", run, options=[("--install", None), ("-o", arguments.o)])
        )
        show("Install it by", f"  {command}", "then predict with one of")
    show(*(f"  {line}" for line in describe_prediction(path, dataset)))
    return 0


def fetch_model_entry() -> None:
    """Entry point of the console script `nnUNetv2_fed_fetch_model`."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
