"""Prepare server and sites of an NVIDIA FLARE network for federations, and write jobs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.federated.commands.coordinator_options import (
    add_method_options,
    add_protection_options,
    add_round_options,
    add_training_options,
    port_number,
    split_words,
)
from nnunetv2.federated.errors import FederationError
from nnunetv2.utilities.plain_text import shell_command, show

if TYPE_CHECKING:
    from nnunetv2.federated.engine.plan import ServerFile, SiteFile

STARTUP_FILES = {"server": "fed_server.json", "site": "fed_client.json"}


# --------------------------------------------------------------------------------------------------------- commands
def allow(arguments: argparse.Namespace) -> None:
    """Print the line that a participant adds to its list of allowed classes."""
    from nnunetv2.federated.engine.nvflare.job import describe_allowing

    show(describe_allowing(arguments.kind))


def prepare_server(arguments: argparse.Namespace) -> None:
    """Write the decisions of the server's operator into its startup kit."""
    from nnunetv2.federated.engine.plan import SERVER_FILE, ServerFile

    folder = arguments.folder.expanduser().resolve()
    kit = _check_kit(arguments.kit, "server")
    if folder == kit or kit in folder.parents:
        raise FederationError(f"{folder} lies in the startup kit, which is replaced one day: choose a folder elsewhere")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(ServerFile(folder=str(folder), port=arguments.port), kit / "local" / SERVER_FILE)
    _remind(kit, "server")


def prepare_site(arguments: argparse.Namespace) -> None:
    """Write a site's permissions for jobs into its startup kit."""
    from nnunetv2.federated.engine.plan import SITE_FILE, SiteFile
    from nnunetv2.federated.protocol.strict_json import validated
    from nnunetv2.utilities.command_line import find_command

    kit = _check_kit(arguments.kit, "site")
    folder = (arguments.folder or kit.with_name(f"{kit.name}-nnunet")).expanduser().resolve()
    values: dict[str, Any] = {
        "folder": str(folder),
        "dataset": arguments.dataset,
        "environment": _environment(arguments.env),
        "commands": None if arguments.commands is None else str(arguments.commands.expanduser().resolve()),
        "planning": arguments.planning,
        "plans": arguments.p,
        "device": arguments.device,
        "attach": arguments.attach,
    }
    for name in ("steps", "configurations", "folds", "trainers"):
        if getattr(arguments, name) is not None:
            values[name] = tuple(getattr(arguments, name))
    for name in ("plan_options", "train_options"):
        values[name] = split_words(getattr(arguments, name), f"--{name.replace('_', '-')}")
    site = validated(lambda: SiteFile(**values), "the command line")
    if not site.attach:
        commands = {"plan": "nnUNetv2_plan_and_preprocess", "train": "nnUNetv2_train"}
        for step in site.steps:
            find_command(commands[step], site.commands_folder)
    _check_dataset(site)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(site, kit / "local" / SITE_FILE)
    _remind(kit, "site")


def write_job(arguments: argparse.Namespace) -> None:
    """Write the folder of a job."""
    from nnunetv2.federated.commands.coordinator import given_settings
    from nnunetv2.federated.coordinator.founding import with_geometry
    from nnunetv2.federated.engine import plan
    from nnunetv2.federated.engine.nvflare.job import write_job as write
    from nnunetv2.federated.protocol.api import Secure
    from nnunetv2.federated.protocol.strict_json import validated

    given = with_geometry(given_settings(arguments), None)
    sites = given.pop("sites", ())
    assert isinstance(sites, tuple)
    settings: dict[str, Any] = {
        name: value.model_dump() if isinstance(value, Secure) else value for name, value in given.items()
    }
    task = validated(
        lambda: plan.CoordinatorTask(federation=arguments.federation, settings=settings), "the command line"
    )
    if sites:
        plan.settings_of_task(task, sites)  # do they go together?
    site = validated(
        lambda: plan.SiteTask(
            federation=arguments.federation,
            steps=tuple(arguments.steps),
            configuration=arguments.c,
            fold=arguments.f,
            trainer=arguments.tr,
        ),
        "the command line",
    )
    write(arguments.folder, task, site, sites=sites)
    show(
        f"Written: {arguments.folder}. Submit it, and again after a crash: it goes on where it was.",
        f"  {shell_command('nvflare', 'job', 'submit', options=[('-j', str(arguments.folder))])}",
    )


# ---------------------------------------------------------------------------------------------------------- helpers
def _check_kit(kit: Path, kind: str) -> Path:
    """Return the folder of a startup kit, or raise FederationError if it is none of this kind."""
    kit = kit.expanduser().resolve()
    if not (kit / "startup" / STARTUP_FILES[kind]).is_file():
        raise FederationError(
            f"{kit} is no startup kit of a {kind}: expected startup/{STARTUP_FILES[kind]} there, as NVFlare provisions"
        )
    return kit


def _check_dataset(site: SiteFile) -> None:
    """Raise FederationError if the dataset of a site is not where its environment says."""
    roots = [site.environment[name] for name in ("nnUNet_raw", "nnUNet_preprocessed") if name in site.environment]
    pattern = f"Dataset{int(site.dataset):03d}_*" if site.dataset.isdecimal() else site.dataset
    if not any(next(Path(root).glob(pattern), None) for root in roots):
        raise FederationError(
            f"there is no dataset {site.dataset} below {' or '.join(roots) or 'any folder'}: give its folders, for "
            "example --env nnUNet_raw=/data/raw nnUNet_preprocessed=/data/preprocessed nnUNet_results=/data/results"
        )


def _environment(words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise FederationError(f"--env takes NAME=VALUE, not {word[:80]!r}")
    return dict(word.split("=", 1) for word in words)


def _write(content: ServerFile | SiteFile, path: Path) -> None:
    from nnunetv2.utilities.atomic_write import save_json_atomically

    path.parent.mkdir(exist_ok=True)
    save_json_atomically(content.model_dump(mode="json"), path)
    show(f"Written: {path}")


def _remind(kit: Path, kind: str) -> None:
    """Tell which class is to be allowed, unless it is."""
    from nnunetv2.federated.engine.nvflare.job import ALLOW_LIST, describe_allowing, is_allowed

    if not is_allowed(kit, kind):
        show(
            f"Jobs are refused until {kit / 'local' / 'resources.json'} (a copy of resources.json.default) has this "
            f"line in {ALLOW_LIST}:",
            f"  {describe_allowing(kind)}",
        )


# ----------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_engine`."""
    parser = argparse.ArgumentParser(
        description="Run a federation on an existing network of NVIDIA FLARE (NVFlare 2.9): it carries all bytes, "
        "the coordinator decides as ever."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("allow", help="print the line that a participant adds to its class_allow_list")
    one.add_argument("kind", choices=("server", "site"))
    one.set_defaults(function=allow)

    one = commands.add_parser("server", help="say where the server keeps federations")
    one.add_argument("--kit", type=Path, required=True, metavar="F", help="startup kit of the server")
    one.add_argument("--folder", type=Path, required=True, metavar="F", help="folder below which federations are kept")
    one.add_argument(
        "--port",
        type=port_number,
        metavar="N",
        help="serve operators on this port of the server itself while a job runs, 0 for any free one (default: not)",
    )
    one.set_defaults(function=prepare_server)

    one = commands.add_parser("site", help="say what a site lets jobs do, and with what")
    _add_site_options(one)
    one.set_defaults(function=prepare_site)

    one = commands.add_parser("job", help="write a job; its further options are those of nnUNetv2_fed_coordinator")
    _add_job_options(one)
    one.set_defaults(function=write_job)
    return parser


def _add_site_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kit", type=Path, required=True, metavar="F", help="startup kit of the site")
    parser.add_argument("--dataset", required=True, metavar="ID", help="id or name of the site's dataset")
    parser.add_argument(
        "--folder", type=Path, metavar="F", help="folder for credential, identity and logs (default: beside the kit)"
    )
    parser.add_argument(
        "--env", nargs="+", default=(), metavar="NAME=VALUE", help="variables of the commands, such as nnUNet_raw"
    )
    parser.add_argument("--steps", nargs="+", choices=("plan", "train"), help="that jobs may ask for (default: both)")
    parser.add_argument("--configurations", nargs="+", metavar="C", help="that jobs may ask for (default: 3d_fullres)")
    parser.add_argument("--folds", nargs="+", metavar="F", help="that jobs may ask for (default: all of them)")
    parser.add_argument(
        "--trainers", nargs="+", metavar="TR", help="that jobs may ask for (default: nnUNetTrainerAsymFedAvg)"
    )
    parser.add_argument("--planning", choices=("ffe", "asym"), default="ffe", help="how to plan (default: %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu", "mps"), default="cuda", help="to train on (default: %(default)s)"
    )
    parser.add_argument("--plan-options", default="", metavar="WORDS", help="further words for planning, in quotes")
    parser.add_argument("--train-options", default="", metavar="WORDS", help="further words for training, in quotes")
    parser.add_argument(
        "--commands",
        type=Path,
        metavar="F",
        help="folder with this package's commands (default: where NVFlare's Python is)",
    )
    parser.add_argument(
        "--attach", action="store_true", help="a job opens the gateway only, and people type the commands"
    )


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder for the job")
    parser.add_argument(
        "--federation", required=True, metavar="NAME", help="a known name goes on, a new one founds a federation"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=("plan", "train"), default=("plan", "train"), help="what sites do (default: both)"
    )
    parser.add_argument(
        "-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration (default: %(default)s)"
    )
    parser.add_argument("-f", default="0", metavar="FOLD", help="fold (default: %(default)s)")
    parser.add_argument(
        "-tr", default="nnUNetTrainerAsymFedAvg", metavar="TRAINER", help="trainer (default: %(default)s)"
    )
    group = parser.add_argument_group("what holds for all sites", "Fixed by the first job of a federation.")
    add_training_options(group)
    add_round_options(group)
    add_protection_options(group)
    add_method_options(parser, with_files=False)  # a job brings none


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_engine`."""
    arguments = build_parser().parse_args(argv)
    arguments.function(arguments)
    return 0


def engine_entry() -> None:
    """Entry point of the console script."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
