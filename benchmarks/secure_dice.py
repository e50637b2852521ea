"""Let hippocampus sites train in clear and behind masks, and compare how well both segment.

    python -m benchmarks.secure_dice --folder WORK [--data FOLDER] [--warm_up 40] [--epochs 4] [--iterations 25]

Five sites of `benchmarks.studies` plan together. Site A trains a network alone, from which both federations start
(`--initial-weights`), so that few rounds lead to networks that segment. Everything is seeded; the federations differ
by `--secure` alone. Dice is that of each site's final network on the validation scans of its fold 0. Wanted: a
difference of at most 0.002 in the mean. Steps that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies import TASKS, dataset_name, write_datasets
from nnunetv2.comparison.plans_patch import patch_plans
from nnunetv2.federated.commands.simulate import LocalSite, run_everywhere, running_coordinator

TASK = TASKS["hippocampus"]
LIMIT = 0.002
ALONE, TOGETHER = "nnUNetTrainer", "nnUNetTrainerAsymFedAvg"
CONFIGURATION = TASK.configuration


def make_sites(folder: Path, arm: str) -> list[LocalSite]:
    """Give each site results and a credential of this arm; planned data are common."""
    roots = {
        "nnUNet_raw": str(folder / "nnUNet_raw"),
        "nnUNet_preprocessed": str(folder / "nnUNet_preprocessed"),
        "nnUNet_results": str(folder / arm / "nnUNet_results"),
        "nnUNet_seed": "0",
        "nnUNet_n_proc_DA": "0",
        "OMP_NUM_THREADS": "1",
    }
    names = [dataset_name(TASK, site) for site in TASK.sites]
    credentials = folder / arm / "credentials"
    return [
        LocalSite(name=name, dataset=name, credential=credentials / f"{name}.json", environment=roots) for name in names
    ]


def plan(folder: Path) -> None:
    """Plan together and preprocess."""
    sites = make_sites(folder, "planning")
    preprocessed = folder / "nnUNet_preprocessed"
    preprocessed.mkdir(exist_ok=True)
    with running_coordinator(folder / "planning" / "coordinator", sites):
        run_everywhere(
            sites,
            lambda site: ["nnUNetv2_plan_and_preprocess", "-d", site.dataset, "--no_pp", "-npfp", "1", "--federated"],
            step="plan",
            log_folder=folder / "logs",
        )
    for site in sites:
        patch_plans(
            preprocessed / site.dataset / "nnUNetPlans.json", {"configurations": {CONFIGURATION: dict(TASK.network)}}
        )
    run_everywhere(
        sites,
        lambda site: ["nnUNetv2_preprocess", "-d", site.dataset, "-c", CONFIGURATION, "-np", "1"],
        step="preprocess",
        log_folder=folder / "logs",
    )


def train_command(site: LocalSite, trainer: str, *options: str) -> list[str]:
    """Return the command with which a site trains."""
    return ["nnUNetv2_train", site.dataset, CONFIGURATION, "0", "-tr", trainer, "-device", "cpu", *options]


def model_folder(site: LocalSite, trainer: str) -> Path:
    """Return the folder of fold 0 that a training leaves."""
    name = f"{trainer}__nnUNetPlans__{CONFIGURATION}"
    return Path(site.environment["nnUNet_results"]) / site.dataset / name / "fold_0"


def warm_up(folder: Path, length: Sequence[str]) -> Path:
    """Train site A alone; return the checkpoint."""
    first = make_sites(folder, "warm_up")[0]
    path = model_folder(first, ALONE) / "checkpoint_final.pth"
    if not path.is_file():
        run_everywhere(
            [first], lambda site: train_command(site, ALONE, *length), step="warm_up", log_folder=folder / "logs"
        )
    return path


def federate(folder: Path, arm: str, options: Sequence[str]) -> dict[str, float]:
    """Train with all sites; return the Dice of each, mean of both labels."""
    sites = make_sites(folder, arm)
    summaries = {site.name: model_folder(site, TOGETHER) / "validation" / "summary.json" for site in sites}
    if not all(path.is_file() for path in summaries.values()):
        with running_coordinator(folder / arm / "coordinator", sites, options):
            run_everywhere(
                sites, lambda site: train_command(site, TOGETHER), step=f"train.{arm}", log_folder=folder / "logs"
            )
    return {name: json.loads(path.read_text())["foreground_mean"]["Dice"] for name, path in summaries.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Train both ways and print the table; status 1 if they are too far apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FEDNNUNET_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--warm_up", type=int, default=40, help="epochs of site A alone (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="rounds of the federations (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=25, help="per epoch (default: %(default)s)")
    arguments = parser.parse_args(argv)
    folder, iterations = arguments.folder.resolve(), str(arguments.iterations)
    if not (folder / "nnUNet_raw").exists():
        write_datasets(TASK, arguments.data.resolve(), folder / "nnUNet_raw")
    if not (folder / "nnUNet_preprocessed").exists():
        plan(folder)
    length = ("--epochs", str(arguments.warm_up), "--iterations", iterations, "--val_iterations", "2")
    start = warm_up(folder, length)
    options = ["--epochs", str(arguments.epochs), "--iterations", iterations, "--val-iterations", "2"]
    options += ["--initial-weights", str(start)]
    clear = federate(folder, "clear", options)
    masked = federate(folder, "masked", [*options, "--secure"])
    print("| site | in clear | `--secure` | difference |\n|---|---|---|---|")
    for site, dice in clear.items():
        print(f"| {site} | {dice:.4f} | {masked[site]:.4f} | {masked[site] - dice:+.4f} |")
    means = [statistics.mean(one.values()) for one in (clear, masked)]
    print(f"| mean | {means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f} |")
    return 0 if abs(means[1] - means[0]) <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
