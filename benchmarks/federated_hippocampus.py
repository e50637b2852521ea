"""Compare federated with local and with pooled training on real scans: hippocampus MR in five intensity groups.

    python -m benchmarks.federated_hippocampus --data FOLDER_OF_HIPPOCAMPUS --folder WORK [--epochs 40 --iterations 25]

Four arms with equal iterations per network: federated with one plan (ffe), federated with each site's own plan (asym),
each site alone, and all data in one place (pooled). The test column of `sites.csv` is held out; both scans of a subject
are always on the same side. Networks, patches and batches are small, as two CPU cores demand.

Prints a Markdown table of test Dice per site and arm and writes it, with all settings, to WORK/result.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.federated.commands.simulate import LocalSite, run_everywhere, running_coordinator

SITES = ("A", "B", "C", "D", "E")
POOLED = "all"
LABELS = {"background": 0, "anterior": 1, "posterior": 2}
CONFIGURATION, FOLD = "3d_fullres", "all"
FEATURES, BATCH_SIZE, PATCH_SIZE = (8, 16, 32, 64), 2, (32, 40, 32)
ARMS = ("ffe", "asym", "alone", "pooled")

SHORT_TRAINER = '''
import os
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerShort(nnUNetTrainer):
    """The default trainer with the number of epochs and iterations of this comparison."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ["BENCHMARK_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["BENCHMARK_ITERATIONS"])
        self.num_val_iterations_per_epoch = 2

    def perform_actual_validation(self, save_probabilities=False):
        """Do nothing: test cases are predicted afterwards, and fold all has no others."""
'''


def write_raw_datasets(data: Path, raw: Path) -> None:
    """Write one dataset per site and one of all, linking the scans; test cases go to imagesTs and labelsTs."""
    with (data / "sites.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, site in enumerate([*SITES, POOLED]):
        folder = raw / dataset_name(number)
        chosen = [row for row in rows if site in (POOLED, row["site"])]
        for suffix in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (folder / suffix).mkdir(parents=True)
        for row in chosen:
            kind = "Tr" if row["split"] == "train" else "Ts"
            case = row["case"]
            (folder / f"images{kind}" / f"{case}_0000.nii.gz").symlink_to(data / "images" / f"{case}.nii.gz")
            (folder / f"labels{kind}" / f"{case}.nii.gz").symlink_to(data / "labels" / f"{case}.nii.gz")
        description = {
            "channel_names": {"0": "MRI"},
            "labels": LABELS,
            "file_ending": ".nii.gz",
            "numTraining": sum(row["split"] == "train" for row in chosen),
        }
        (folder / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")


def dataset_name(number: int) -> str:
    """Return the folder name of a site's dataset; the last one holds all cases."""
    return f"Dataset{400 + number}_Hippocampus{[*SITES, 'All'][number]}"


def shrink_plans(folder: Path, plans_name: str) -> None:
    """Replace the plans with a network that two CPU cores can train."""
    path = folder / f"{plans_name}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"] = BATCH_SIZE
    configuration["patch_size"] = list(PATCH_SIZE)
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [FEATURES[min(stage, len(FEATURES) - 1)] for stage in range(network["n_stages"])]
    path.write_text(json.dumps(plans, indent=4), encoding="utf-8")


class Comparison:
    """The sites, folders and settings of one comparison.

    Args:
        folder: Everything is written here.
        epochs, iterations: Length of every training, in rounds and iterations per round.
    """

    def __init__(self, folder: Path, *, epochs: int, iterations: int) -> None:
        self.folder, self.epochs, self.iterations = folder, epochs, iterations
        roots = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for root in roots.values():
            Path(root).mkdir(parents=True, exist_ok=True)
        trainers = folder / "trainers"
        trainers.mkdir(exist_ok=True)
        (trainers / "nnUNetTrainerShort.py").write_text(SHORT_TRAINER, encoding="utf-8")
        environment = {
            **roots,
            "nnUNet_extTrainer": str(trainers),
            "BENCHMARK_EPOCHS": str(epochs),
            "BENCHMARK_ITERATIONS": str(iterations),
        }
        self.sites = [
            LocalSite(
                name=name,
                dataset=dataset_name(number),
                environment=environment,
                credential=folder / "credentials" / f"{name}.json",
            )
            for number, name in enumerate([*SITES, POOLED])
        ]

    def everywhere(self, step: str, sites: Sequence[LocalSite], command_of) -> float:
        """Run a command at all sites and return the seconds it took."""
        start = time.monotonic()
        run_everywhere(sites, command_of, step=step, log_folder=self.folder / "logs")
        return time.monotonic() - start

    def plan(self, sites: Sequence[LocalSite], plans_name: str, *options: str) -> None:
        """Plan, shrink the plans, preprocess."""
        self.everywhere(
            f"plan.{plans_name}",
            sites,
            lambda site: [
                "nnUNetv2_plan_and_preprocess",
                "-d",
                site.dataset[7:10],
                "-c",
                CONFIGURATION,
                "-npfp",
                "1",
                "-np",
                "1",
                "-overwrite_plans_name",
                plans_name,
                *options,
            ],
        )
        for site in sites:
            shrink_plans(self.folder / "nnUNet_preprocessed" / site.dataset, plans_name)

    def train(self, sites: Sequence[LocalSite], plans_name: str, trainer: str) -> float:
        """Train at all sites at the same time."""
        return self.everywhere(
            f"train.{plans_name}.{trainer}",
            sites,
            lambda site: [
                "nnUNetv2_train",
                site.dataset,
                CONFIGURATION,
                FOLD,
                "-tr",
                trainer,
                "-p",
                plans_name,
                "-device",
                "cpu",
            ],
        )

    def federate(self, name: str, plans_name: str, *options: str) -> float:
        """Plan and train with a coordinator of their own."""
        # Each arm is a federation of its own, so that no credential and no weight is left from another one.
        sites = [
            LocalSite(
                name=site.name,
                dataset=site.dataset,
                environment=site.environment,
                credential=self.folder / "credentials" / f"{site.name}.{name}.json",
            )
            for site in self.sites[:-1]
        ]
        settings = ("--epochs", str(self.epochs), "--iterations", str(self.iterations), "--val-iterations", "2")
        with running_coordinator(self.folder / f"federation_{name}", sites, settings):
            self.plan(sites, plans_name, "--federated", name, *options)
            return self.train(sites, plans_name, "nnUNetTrainerAsymFedAvg")

    def test(self, arm: str, plans_name: str, trainer: str, model_of=None) -> dict[str, dict]:
        """Predict every site's test cases with the model of that site (or of another) and return the summaries."""
        results = self.folder / "nnUNet_results"

        def model(site: LocalSite) -> str:
            return str(results / (model_of or site).dataset / f"{trainer}__{plans_name}__{CONFIGURATION}")

        sites = self.sites[:-1]
        outputs = {site.name: self.folder / "predictions" / arm / site.name for site in sites}
        raw = self.folder / "nnUNet_raw"
        self.everywhere(
            f"predict.{arm}",
            sites,
            lambda site: [
                "nnUNetv2_predict_from_modelfolder",
                "-i",
                str(raw / site.dataset / "imagesTs"),
                "-o",
                str(outputs[site.name]),
                "-m",
                model(site),
                "-f",
                FOLD,
                "-device",
                "cpu",
                "-npp",
                "1",
                "-nps",
                "1",
                "--disable_progress_bar",
            ],
        )
        self.everywhere(
            f"evaluate.{arm}",
            sites,
            lambda site: [
                "nnUNetv2_evaluate_simple",
                str(raw / site.dataset / "labelsTs"),
                str(outputs[site.name]),
                "-l",
                "1",
                "2",
                "-np",
                "1",
            ],
        )
        return {
            name: json.loads((output / "summary.json").read_text(encoding="utf-8")) for name, output in outputs.items()
        }

    def run_arm(self, arm: str) -> tuple[dict[str, dict], float]:
        """Run one arm; return its summaries per site and the seconds of training."""
        if arm == "ffe":
            seconds = self.federate("ffe", "nnUNetPlansFFE")
            return self.test(arm, "nnUNetPlansFFE", "nnUNetTrainerAsymFedAvg"), seconds
        if arm == "asym":
            seconds = self.federate("asym", "nnUNetPlansAsym")
            return self.test(arm, "nnUNetPlansAsym", "nnUNetTrainerAsymFedAvg"), seconds
        if arm == "alone":
            self.plan(self.sites[:-1], "nnUNetPlansAlone")
            seconds = self.train(self.sites[:-1], "nnUNetPlansAlone", "nnUNetTrainerShort")
            return self.test(arm, "nnUNetPlansAlone", "nnUNetTrainerShort"), seconds
        self.plan(self.sites[-1:], "nnUNetPlansPooled")
        seconds = self.train(self.sites[-1:], "nnUNetPlansPooled", "nnUNetTrainerShort")
        return self.test(arm, "nnUNetPlansPooled", "nnUNetTrainerShort", model_of=self.sites[-1]), seconds


def print_table(summaries: dict[str, dict[str, dict]]) -> None:
    """Print test Dice (mean of both labels) per site and arm as a Markdown table."""
    print("\n| site | test cases | " + " | ".join(summaries) + " |\n|---|---|" + "---|" * len(summaries))
    dice = {arm: [sites[name]["foreground_mean"]["Dice"] for name in SITES] for arm, sites in summaries.items()}
    first = next(iter(summaries.values()))
    for row, name in enumerate(SITES):
        values = " | ".join(f"{dice[arm][row]:.4f}" for arm in summaries)
        print(f"| {name} | {len(first[name]['metric_per_case'])} | {values} |")
    print("| mean of sites | | " + " | ".join(f"{sum(values) / len(values):.4f}" for values in dice.values()) + " |")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FEDNNUNET_DATA", "../shared/data")) / "hippocampus"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder; finished arms in it are kept")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    comparison = Comparison(folder, epochs=arguments.epochs, iterations=arguments.iterations)
    if not any((folder / "nnUNet_raw").iterdir()):
        write_raw_datasets(arguments.data.resolve(), folder / "nnUNet_raw")
    result_file = folder / "result.json"
    result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {}
    for arm in arguments.arms:
        if arm not in result:
            summaries, seconds = comparison.run_arm(arm)
            result[arm] = {
                "summaries": summaries,
                "training_s": seconds,
                "epochs": arguments.epochs,
                "iterations": arguments.iterations,
                "features": FEATURES,
                "batch_size": BATCH_SIZE,
                "patch_size": PATCH_SIZE,
            }
            result_file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print_table({arm: content["summaries"] for arm, content in result.items()})
    for arm, content in result.items():
        print(f"{arm}: {content['training_s']:.0f} s of training")
    shutil.rmtree(folder / "predictions", ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
