"""Train where sites annotate different classes, beside the same sites with all labels and beside each site alone.

    python -m benchmarks.partial_labels --folder WORK [--data FOLDER] [--seeds 1]

Hippocampus, five sites: A and B annotate anterior only, C and D posterior only, E both; the script hides the rest, and
C and D call posterior 1, as they would. Three ways to train, with equal iterations at each site:

    full     all labels at all sites
    union    the hidden labels, with `nnUNetv2_fed_coordinator --labels union`
    alone    the hidden labels, each site by itself

Every model is scored on all classes of the test cases of its site, whose labels are whole. The bar: union has 0.97 of
the Dice of full, and is above alone.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from benchmarks.studies import TASKS, dataset_name, local_sites, write_datasets
from nnunetv2.comparison.plans_patch import patch_plans
from nnunetv2.comparison.running import show_commands
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.federated.commands.simulate import LocalSite, run_everywhere, running_coordinator
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.training.seeding import SEED_VARIABLE
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.plain_text import show

TASK = TASKS["hippocampus"]
ANNOTATED: Mapping[str, tuple[str, ...]] = {
    "A": ("anterior",),
    "B": ("anterior",),
    "C": ("posterior",),
    "D": ("posterior",),
    "E": ("anterior", "posterior"),
}
VAL_ITERATIONS = 2


# ------------------------------------------------------------------------------------------------------------- data
def hide_labels(folder: Path, classes: Sequence[str]) -> None:
    """Leave only some classes in the training labels of a raw dataset, numbered from 1."""
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    values = {description["labels"][name]: number for number, name in enumerate(classes, 1)}
    for file in sorted((folder / "labelsTr").iterdir()):
        whole = sitk.ReadImage(str(file))
        labels = sitk.GetArrayFromImage(whole)
        hidden = np.zeros_like(labels)
        for value, number in values.items():
            hidden[labels == value] = number
        image = sitk.GetImageFromArray(hidden)
        image.CopyInformation(whole)
        file.unlink()  # a link to the shared data
        sitk.WriteImage(image, str(file))
    description["labels"] = {"background": 0, **{name: number for number, name in enumerate(classes, 1)}}
    (folder / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")


def make_raw_data(data: Path, folder: Path) -> dict[str, Path]:
    """Write the datasets with all labels, and with those of each site only; return both roots."""
    roots = {kind: folder / f"nnUNet_raw_{kind}" for kind in ("full", "hidden")}
    for kind, root in roots.items():
        if root.exists():
            continue
        partial = root.with_name(f"{root.name}.partial")
        write_datasets(TASK, data, partial)
        if kind == "hidden":
            for site, classes in ANNOTATED.items():
                hide_labels(partial / dataset_name(TASK, site), classes)
        partial.rename(root)
    return roots


# ------------------------------------------------------------------------------------------------------- trainings
class Arm:
    """One way to train, in a folder of its own.

    Args:
        options: Of the coordinator; None: each site trains alone.
    """

    def __init__(self, folder: Path, raw: Path, options: Sequence[str] | None, seed: int) -> None:
        self.folder, self.raw, self.options = folder, raw, options
        roots = {
            "nnUNet_raw": str(raw),
            "nnUNet_preprocessed": str(folder / "preprocessed"),
            "nnUNet_results": str(folder / "results"),
            SEED_VARIABLE: str(seed),
        }
        self.sites = local_sites(TASK, folder / "credentials", roots)

    @property
    def trainer(self) -> str:
        """Return the class of its trainers."""
        return "nnUNetTrainer" if self.options is None else "nnUNetTrainerAsymFedAvg"

    def run(self) -> None:
        """Plan, preprocess and train at all sites, unless that is done; go on with interrupted steps."""
        done = self.folder / "done"
        if done.exists():
            return
        if self.options is None:
            self._plan_and_train(length=["--epochs", str(TASK.epochs), "--iterations", str(TASK.iterations)])
        else:
            settings = ["--epochs", str(TASK.epochs), "--iterations", str(TASK.iterations)]
            settings += ["--val-iterations", str(VAL_ITERATIONS), *self.options]
            with running_coordinator(self.folder / "federation", self.sites, settings, show=show_commands):
                self._plan_and_train(planning=["--federated"], length=[])
        done.touch()

    def _plan_and_train(self, *, planning: Sequence[str] = (), length: Sequence[str]) -> None:
        common = ["-c", TASK.configuration]
        plan = ["nnUNetv2_plan_and_preprocess", "--no_pp", "-npfp", "1", "--no_pbar", *planning]
        self._everywhere("plan", lambda site: [plan[0], "-d", site.dataset, *plan[1:]])
        for site in self.sites:
            patch_plans(
                self.folder / "preprocessed" / site.dataset / "nnUNetPlans.json",
                {"configurations": {TASK.configuration: dict(TASK.network)}},
            )
        self._everywhere(
            "preprocess", lambda site: ["nnUNetv2_preprocess", "-d", site.dataset, *common, "-np", "1", "--no_pbar"]
        )
        options = [*length, *(["--val_iterations", str(VAL_ITERATIONS)] if length else [])]
        self._everywhere(
            "train",
            lambda site: [
                *("nnUNetv2_train", site.dataset, TASK.configuration, "0", "-tr", self.trainer, "-device", "cpu"),
                *("--c", "--no_validation", *options),
            ],
        )

    def score(self) -> dict[str, dict[str, float]]:
        """Return the Dice per class and site by the site's model; NaN for missing classes."""
        common = ["-c", TASK.configuration, "-f", "0", "-tr", self.trainer, "-device", "cpu"]
        self._everywhere(
            "predict",
            lambda site: [
                *(
                    "nnUNetv2_predict",
                    "-i",
                    str(self.raw / site.dataset / "imagesTs"),
                    "-o",
                    str(self._predicted(site)),
                ),
                *("-d", site.dataset, *common, "-npp", "1", "-nps", "1", "--disable_progress_bar"),
            ],
        )
        return {site.name: self._score(site) for site in self.sites}

    def _predicted(self, site: LocalSite) -> Path:
        return self.folder / "predicted" / site.name

    def _score(self, site: LocalSite) -> dict[str, float]:
        predicted = self._predicted(site)
        described = json.loads((predicted / "dataset.json").read_text(encoding="utf-8"))["labels"]
        whole = {name: value for name, value in TASK.labels.items() if value}
        if any(described.get(name, value) != value for name, value in whole.items()):
            self._renumber(predicted, {described[name]: value for name, value in whole.items() if name in described})
        results = compute_metrics_on_folder(
            str(self.raw / site.dataset / "labelsTs"),
            str(predicted),
            None,
            SimpleITKIO(),
            TASK.file_ending,
            list(whole.values()),
            num_processes=1,
        )
        found: dict[Any, Any] = results["mean"]
        return {name: float(found[value]["Dice"]) if name in described else np.nan for name, value in whole.items()}

    def _renumber(self, folder: Path, values: Mapping[int, int]) -> None:
        """Give predictions of a model with fewer classes the numbers of all classes, once."""
        for file in sorted(folder.glob(f"*{TASK.file_ending}")):
            image = sitk.ReadImage(str(file))
            labels = sitk.GetArrayFromImage(image)
            renumbered = sitk.GetImageFromArray(np.select([labels == old for old in values], list(values.values()), 0))
            renumbered.CopyInformation(image)
            sitk.WriteImage(sitk.Cast(renumbered, sitk.sitkUInt8), str(file))
        description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        names = {name: value for name, value in TASK.labels.items() if name in description["labels"]}
        save_json_atomically({**description, "labels": names}, folder / "dataset.json")

    def _everywhere(self, step: str, command_of: Callable[[LocalSite], Sequence[str]]) -> None:
        run_everywhere(self.sites, command_of, step=step, log_folder=self.folder / "logs", show=show_commands)


# ----------------------------------------------------------------------------------------------------------- report
def table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Return a table's lines: Dice per class and site, by arm; a star marks annotated classes."""
    lines = ["| site | class | " + " | ".join(scores) + " | union / full |", "|---" * (len(scores) + 3) + "|"]
    for site, annotated in ANNOTATED.items():
        for name in ("anterior", "posterior"):
            values = {arm: found[site][name] for arm, found in scores.items()}
            cells = " | ".join("-" if np.isnan(value) else f"{value:.3f}" for value in values.values())
            star = "*" if name in annotated else ""
            lines.append(f"| {site} | {name}{star} | {cells} | {values['union'] / values['full']:.3f} |")
    means = {
        arm: np.nanmean([value for site in found.values() for value in site.values()]) for arm, found in scores.items()
    }
    cells = " | ".join(f"{value:.3f}" for value in means.values())
    lines.append(f"| all | mean | {cells} | {means['union'] / means['full']:.3f} |")
    return lines


def mean_scores(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the means over seeds."""
    return {
        site: {name: float(np.mean([run[site][name] for run in runs])) for name in found}
        for site, found in runs[0].items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run all trainings that are not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FEDNNUNET_DATA", "../shared/data")))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    roots = make_raw_data(arguments.data.resolve(), folder)
    ways: Mapping[str, tuple[str, Sequence[str] | None]] = {
        "full": ("full", []),
        "union": ("hidden", ["--labels", "union"]),
        "alone": ("hidden", None),
    }
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in ways}
    for seed in range(arguments.seeds):
        for name, (kind, options) in ways.items():
            show(f"--- {name}, seed {seed} ---")
            arm = Arm(folder / f"{name}.seed_{seed}", roots[kind], options, seed)
            arm.run()
            runs[name].append(arm.score())
            save_json_atomically(runs, folder / "scores.json")
    show(*table({name: mean_scores(found) for name, found in runs.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
