"""Measure the cost in Dice of differential privacy for each patient: hippocampus MR, plain and with epsilon 8 and 3.

    python -m benchmarks.privacy_price --data FOLDER_OF_HIPPOCAMPUS --folder WORK [--epochs 20 --steps 15 --lot 8]

Sites A to D train together (AsymFedAvg, over real HTTP, all in one process), each with some 30 patients, of whom most
have two scans. Site E has 19 patients, too few for differential privacy: it lends the plans, and, in the arms that are
called pretrained, the weights of a training of its own; its patients are not protected. All arms draw the same number
of patches. The test column of `sites.csv` is held out; both scans of a patient are on the same side.

The network is a small one for slices (configuration 2d), as two CPU cores demand, and as noise does, whose length grows
with the root of the number of parameters.

Prints a Markdown table of test Dice per site and arm; WORK/result.json keeps it, with all settings. Arms that are in it
are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SITES, DONOR = ("A", "B", "C", "D"), "E"
CONFIGURATION, PLANS = "2d", "nnUNetPlansDonor"
LABELS = {"background": 0, "anterior": 1, "posterior": 2}
FEATURES, BATCH_SIZE, PATCHES = (8, 16, 16, 16), 4, 1
PLAIN_RATE = 0.05
DELTA = 1 / 300
"""A tenth of the inverse of the number of patients."""


@dataclass(frozen=True)
class Arm:
    """One training of all sites."""

    epsilon: float | None
    """None: without differential privacy."""
    is_pretrained: bool

    @property
    def name(self) -> str:
        """Return the heading of its column."""
        how = "plain" if self.epsilon is None else f"epsilon {self.epsilon:g}"
        return f"{how}, {'pretrained' if self.is_pretrained else 'from scratch'}"


ARMS = tuple(Arm(epsilon, pretrained) for epsilon in (None, 8.0, 3.0) for pretrained in (False, True))
UNTRAINED = "pretrained weights as they are"


def dataset_name(site: str) -> str:
    """Return the folder name of a site's dataset."""
    return f"Dataset{450 + ord(site) - ord('A')}_Hippocampus{site}"


# ------------------------------------------------------------------------------------------------------------- data
def write_raw_datasets(data: Path, raw: Path) -> dict[str, dict[str, list[str]]]:
    """Write a dataset per site, linking the scans; return site -> its cases, by training and test."""
    with (data / "sites.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    splits = {}
    for site in (*SITES, DONOR):
        folder, own = raw / dataset_name(site), [row for row in rows if row["site"] == site]
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for row in own:
            for source, target in (("images", "imagesTr/{}_0000"), ("labels", "labelsTr/{}")):
                link = folder / f"{target.format(row['case'])}.nii.gz"
                if not link.is_symlink():
                    link.symlink_to(data / source / f"{row['case']}.nii.gz")
        description = {
            "channel_names": {"0": "MRI"},
            "labels": LABELS,
            "file_ending": ".nii.gz",
            "numTraining": len(own),
        }
        (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
        (folder / "patients.json").write_text(
            json.dumps({row["case"]: f"subject {row['subject']}" for row in own}), encoding="utf-8"
        )
        splits[site] = {
            part: [row["case"] for row in own if (row["split"] == "train") == (part == "train")]
            for part in ("train", "val")
        }
    return splits


def preprocess(folder: Path, splits: dict[str, dict[str, list[str]]]) -> None:
    """Plan at the donor, give its plans to all sites, preprocess, and write the splits."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess as preprocess_datasets
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )

    number_of = {site: int(dataset_name(site)[7:10]) for site in splits}
    extract_fingerprints(list(number_of.values()), num_processes=1)
    plan_experiments([number_of[DONOR]], overwrite_plans_name=PLANS)
    path = folder / "nnUNet_preprocessed" / dataset_name(DONOR) / f"{PLANS}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"] = BATCH_SIZE
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [FEATURES[min(stage, len(FEATURES) - 1)] for stage in range(network["n_stages"])]
    network["n_conv_per_stage"] = [1] * network["n_stages"]
    network["n_conv_per_stage_decoder"] = [1] * (network["n_stages"] - 1)
    path.write_text(json.dumps(plans), encoding="utf-8")
    for site in SITES:
        move_plans_between_datasets(number_of[DONOR], number_of[site], PLANS)
    preprocess_datasets(list(number_of.values()), PLANS, (CONFIGURATION,), (1,), show_progress_bar=False)
    for site, split in splits.items():
        target = folder / "nnUNet_preprocessed" / dataset_name(site) / "splits_final.json"
        target.write_text(json.dumps([split]), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- trainings
class Comparison:
    """The sites, folders and settings of one comparison.

    Args:
        folder: Everything is written here.
        epochs, steps: Length of every training with differential privacy.
        lot: Patients per step, on average.
        rates: Learning rates with differential privacy, from scratch and from pretrained weights.
    """

    def __init__(self, folder: Path, *, epochs: int, steps: int, lot: int, rates: Sequence[float]) -> None:
        self.folder, self.epochs, self.steps, self.lot, self.rates = folder, epochs, steps, lot, rates

    def pretrain(self) -> Path:
        """Train at the donor alone, and return the checkpoint."""
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        trainer = self._construct(nnUNetTrainer, DONOR, "donor")
        path = Path(trainer.output_folder, "checkpoint_final.pth")
        if not path.is_file():
            trainer.num_epochs, trainer.num_iterations_per_epoch = self.epochs, self._plain_iterations
            trainer.num_val_iterations_per_epoch = 1
            trainer.run_training()
        return path

    def test_untrained(self, checkpoint: Path) -> dict[str, Any]:
        """Test the donor's weights at the other sites."""
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        dice = {}
        for site in SITES:
            trainer = self._construct(nnUNetTrainer, site, "untrained")
            trainer.load_checkpoint(str(checkpoint))
            dice[site] = test(trainer)
        return {"dice": dice}

    def run(self, arm: Arm, checkpoint: Path) -> dict[str, Any]:
        """Train an arm at all sites, and return the test Dice per site, and the privacy spent."""
        from nnunetv2.federated.site.transports.http import HttpTransport
        from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
        from nnunetv2.training.differential_privacy.options import PrivacyOptions
        from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import nnUNetTrainerAsymFedAvg
        from nnunetv2.training.nnUNetTrainer.variants.privacy.nnUNetTrainerDPAsymFedAvg import nnUNetTrainerDPAsymFedAvg

        is_private = arm.epsilon is not None
        name = arm.name.replace(",", "").replace(" ", "_")
        iterations = self.steps if is_private else self._plain_iterations
        start = time.monotonic()
        with served(self.folder / f"federation_{name}", epochs=self.epochs, iterations=iterations) as credentials:
            trainers = []
            for site in SITES:
                trainer = self._construct(
                    nnUNetTrainerDPAsymFedAvg if is_private else nnUNetTrainerAsymFedAvg, site, name
                )
                trainer.credential = credentials[site]
                trainer.make_transport = lambda credential, report: HttpTransport(
                    credential, report=report, pause_s=0.1
                )
                if is_private:
                    trainer.privacy_options = PrivacyOptions(epsilon=arm.epsilon, lot=self.lot, patches=PATCHES)
                    trainer.initial_lr = self.rates[arm.is_pretrained]
                    allow(Path(trainer.preprocessed_dataset_folder_base), arm.epsilon)
                trainer.initialize()
                if arm.is_pretrained:
                    load_pretrained_weights(trainer.network, checkpoint)
                    trainer.pretrained_weights = str(checkpoint)
                trainers.append(trainer)
            in_threads(*(trainer.run_training for trainer in trainers))
        seconds = time.monotonic() - start
        dice = {site: test(trainer) for site, trainer in zip(SITES, trainers)}
        spent = [trainer.privacy_plan for trainer in trainers] if is_private else []
        return {
            "dice": dice,
            "training_s": seconds,
            "sigma": [plan.sigma for plan in spent],
            "epsilon": [plan.epsilon for plan in spent],
            "patients": [len(trainer.patients) for trainer in trainers] if is_private else [],
        }

    @property
    def _plain_iterations(self) -> int:
        """Return the iterations of an epoch in which as many patches are drawn as with lots."""
        return self.steps * self.lot * PATCHES // BATCH_SIZE

    def _construct(self, trainer_class: Any, site: str, arm: str) -> Any:
        """Construct a trainer whose results and ledger belong to an arm alone."""
        import torch

        os.environ["nnUNet_results"] = str(self.folder / "results" / arm)
        preprocessed = self.folder / "nnUNet_preprocessed" / dataset_name(site)
        plans = json.loads((preprocessed / f"{PLANS}.json").read_text(encoding="utf-8"))
        dataset_json = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
        trainer = for_few_steps(trainer_class)(plans, CONFIGURATION, 0, dataset_json, torch.device("cpu"))
        trainer.print_to_log_file = quiet(trainer)
        return trainer


def for_few_steps(trainer_class: Any) -> Any:
    """Return a trainer of the same name that does not augment, and learns fast from the start.

    Momentum 0.9, as with differential privacy: nnU-Net's 0.99 needs more steps than there are here.
    """
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA
    from nnunetv2.training.nnUNetTrainer.variants.privacy.private_training import PrivateTraining
    from nnunetv2.training.optimization import build_sgd

    bases = (nnUNetTrainerNoDA,) if issubclass(nnUNetTrainerNoDA, trainer_class) else (trainer_class, nnUNetTrainerNoDA)

    def configure_optimizers(self: Any) -> tuple[Any, Any]:
        optimizer = build_sgd(
            self.network, initial_lr=PLAIN_RATE, weight_decay=self.weight_decay, device=self.device, momentum=0.9
        )
        return optimizer, PolyLRScheduler(optimizer, PLAIN_RATE, self.num_epochs)

    is_private = issubclass(trainer_class, PrivateTraining)
    return type(trainer_class.__name__, bases, {} if is_private else {"configure_optimizers": configure_optimizers})


def quiet(trainer: Any) -> Any:
    """Return a log that is written to its file only."""
    log = trainer.print_to_log_file
    return lambda *words, **options: log(*words, **{**options, "also_print_to_console": False})


def allow(preprocessed: Path, epsilon: float) -> None:
    """Begin a ledger with a budget: arms are compared, they do not add up."""
    from nnunetv2.federated.privacy.ledger import LEDGER_FILE, Budget, set_budget

    (preprocessed / LEDGER_FILE).unlink(missing_ok=True)
    set_budget(preprocessed / LEDGER_FILE, Budget(epsilon=epsilon, delta=DELTA), by="the benchmark")


def test(trainer: Any) -> float:
    """Return the mean Dice of both labels on the test cases of a site, without mirroring."""
    trainer.inference_allowed_mirroring_axes = None
    trainer.perform_actual_validation()
    summary = json.loads(Path(trainer.output_folder, "validation", "summary.json").read_text(encoding="utf-8"))
    return float(summary["foreground_mean"]["Dice"])


@contextmanager
def served(folder: Path, *, epochs: int, iterations: int):
    """Serve a federation of the sites in a thread; yield their credentials."""
    from nnunetv2.federated.commands.simulate import LocalSite, running_coordinator
    from nnunetv2.federated.site.credential import load_credential

    sites = [LocalSite(name=site, dataset=dataset_name(site), credential=folder / f"{site}.json") for site in SITES]
    folder.mkdir(parents=True, exist_ok=True)
    options = ("--epochs", str(epochs), "--iterations", str(iterations), "--val-iterations", "1")
    with running_coordinator(folder / "coordinator", sites, (*options, "--validate-every", "0")):
        yield {site.name: load_credential(site.credential) for site in sites}


def in_threads(*functions: Any) -> None:
    """Run functions at the same time; raise the first failure."""
    failures: list[BaseException] = []

    def guarded(function: Any) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not failures:
        time.sleep(0.2)
    if failures:
        raise failures[0]


# ------------------------------------------------------------------------------------------------------------ command
def print_table(result: dict[str, dict[str, Any]]) -> None:
    """Print test Dice per site and arm as a Markdown table."""
    print("\n| | " + " | ".join((*SITES, "mean", "noise multiplier")) + " |\n|" + "---|" * (len(SITES) + 3))
    for name, found in result.items():
        values = [found["dice"][site] for site in SITES]
        sigmas = found.get("sigma") or []
        noise = f"{min(sigmas):.2f} to {max(sigmas):.2f}" if sigmas else "0"
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*values, sum(values) / 4)) + f" | {noise} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FEDNNUNET_DATA", "../shared/data")) / "hippocampus"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder; finished arms in it are kept")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=15, help="of an epoch")
    parser.add_argument("--lot", type=int, default=8)
    parser.add_argument(
        "--rates",
        type=float,
        nargs=2,
        default=(0.02, 0.005),
        help="learning rates with differential privacy, from scratch and from pretrained weights",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[arm.name for arm in ARMS],
        metavar="ARM",
        help=f"default: all of {', '.join(repr(arm.name) for arm in ARMS)}",
    )
    arguments = parser.parse_args(argv)
    from nnunetv2.utilities.atomic_write import replacing

    folder = arguments.folder.resolve()
    for root in ("nnUNet_raw", "nnUNet_preprocessed"):
        (folder / root).mkdir(parents=True, exist_ok=True)
        os.environ[root] = str(folder / root)
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1", nnUNet_fed_min_cases="1", nnUNet_cpu_autocast="0")
    splits = write_raw_datasets(arguments.data.resolve(), folder / "nnUNet_raw")
    if not (folder / "nnUNet_preprocessed" / dataset_name("D") / "splits_final.json").is_file():
        preprocess(folder, splits)
    comparison = Comparison(
        folder, epochs=arguments.epochs, steps=arguments.steps, lot=arguments.lot, rates=arguments.rates
    )
    result_file = folder / "result.json"
    result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {}
    checkpoint = comparison.pretrain()
    if UNTRAINED not in result:
        result[UNTRAINED] = comparison.test_untrained(checkpoint)
    for arm in ARMS:
        if arm.name in arguments.arms and arm.name not in result:
            result[arm.name] = {**comparison.run(arm, checkpoint), "settings": vars(arguments) | {"features": FEATURES}}
            with replacing(result_file) as written:
                written.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
            print_table(result)
    print_table(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
