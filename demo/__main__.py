"""Three sites with different scanners train one model: python -m demo [--folder demo-output] [--secure]

Phantom scans are drawn, then the commands run that hospitals type: a coordinator starts, the sites join, plan from the
pooled fingerprint, preprocess, train together, and predict test cases that nobody trained on. With --secure, they mask
what they send, and the coordinator sees sums of all three only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from demo.phantoms import LABELS, Scanner, write_dataset
from demo.report import mean_dice, print_table, save_picture
from nnunetv2.federated.commands.simulate import LocalSite, run_everywhere, running_coordinator

CONFIGURATION, FOLD, TRAINER = "3d_fullres", "0", "nnUNetTrainerAsymFedAvg"
PLANS, SMALL_PLANS = "nnUNetPlans", "nnUNetPlansSmall"
NUM_TRAIN, NUM_TEST = 10, 4
COORDINATOR_OPTIONS = ("--epochs", "20", "--iterations", "36", "--val-iterations", "4")
WANTED_DICE = 0.85

SITES = {
    "north": ("301", Scanner(spacing_mm=(1.25, 1.25, 1.25), intensities=(300, 520, 760), noise=0.25, bias=0.10)),
    "south": ("302", Scanner(spacing_mm=(1.6, 1.0, 1.0), intensities=(60, 95, 130), noise=0.40, bias=0.05)),
    "west": ("303", Scanner(spacing_mm=(2.0, 1.25, 1.25), intensities=(900, 1500, 2300), noise=0.15, bias=0.20)),
}


def make_site(name: str, folder: Path) -> LocalSite:
    """Give a site its own three nnU-Net folders, as if it were another hospital."""
    roots = {root: str(folder / name / root) for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return LocalSite(
        name=name, dataset=SITES[name][0], credential=folder / name / "federated_site.json", environment=roots
    )


def dataset_folder(site: LocalSite, root: str) -> Path:
    """Return the folder of the site's dataset below one of its three roots."""
    return Path(site.environment[root]) / f"Dataset{site.dataset}_Phantom"


def write_small_plans(site: LocalSite) -> None:
    """Copy the plans with a network that two CPU cores can train in minutes: what a user does by hand in an editor."""
    folder = dataset_folder(site, "nnUNet_preprocessed")
    plans = json.loads((folder / f"{PLANS}.json").read_text(encoding="utf-8"))
    plans["plans_name"] = SMALL_PLANS
    configuration = plans["configurations"][CONFIGURATION]
    configuration["batch_size"] = 2
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(64, 8 * 2**stage) for stage in range(network["n_stages"])]
    (folder / f"{SMALL_PLANS}.json").write_text(json.dumps(plans, indent=4), encoding="utf-8")


def find_model(folder: Path) -> Path:
    """Return the model folder that the coordinator wrote at the end of the run."""
    models = folder / "coordinator" / "models"
    found = [path.parent for path in models.glob("*/plans.json")]
    if len(found) != 1:
        raise FileNotFoundError(f"expected one model folder in {models}, found {len(found)}")
    return found[0]


def everywhere(
    step: str, sites: Sequence[LocalSite], folder: Path, command_of: Callable[[LocalSite], list[str]]
) -> None:
    """Run a command at all sites at once and say how long it took."""
    print(f"\n--- {step} ---", flush=True)
    start = time.monotonic()
    run_everywhere(sites, command_of, step=step, log_folder=folder / "logs")
    print(f"--- {step}: {time.monotonic() - start:.0f} s ---", flush=True)


def run(folder: Path, *, is_secure: bool = False) -> bool:
    """Run the demo in an empty folder; return whether every site reached the Dice that is wanted."""
    start = time.monotonic()
    sites = [make_site(name, folder) for name in SITES]
    for seed, site in enumerate(sites):
        write_dataset(
            dataset_folder(site, "nnUNet_raw"), SITES[site.name][1], num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed
        )
    options = [*COORDINATOR_OPTIONS, *(["--secure"] if is_secure else [])]
    with running_coordinator(folder / "coordinator", sites, options):
        everywhere(
            "plan",
            sites,
            folder,
            lambda site: [
                "nnUNetv2_plan_and_preprocess",
                "-d",
                site.dataset,
                "--federated",
                "-c",
                CONFIGURATION,
                "-npfp",
                "1",
                "-np",
                "1",
            ],
        )
        for site in sites:
            write_small_plans(site)
        everywhere(
            "train",
            sites,
            folder,
            lambda site: [
                "nnUNetv2_train",
                site.dataset,
                CONFIGURATION,
                FOLD,
                "-tr",
                TRAINER,
                "-p",
                SMALL_PLANS,
                "-device",
                "cpu",
            ],
        )
    model = find_model(folder)
    everywhere(
        "predict",
        sites,
        folder,
        lambda site: [
            "nnUNetv2_predict_from_modelfolder",
            "-m",
            str(model),
            "-f",
            FOLD,
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
            "-i",
            str(dataset_folder(site, "nnUNet_raw") / "imagesTs"),
            "-o",
            str(folder / site.name / "predictions"),
            "--disable_progress_bar",
        ],
    )
    everywhere(
        "evaluate",
        sites,
        folder,
        lambda site: [
            "nnUNetv2_evaluate_simple",
            str(dataset_folder(site, "nnUNet_raw") / "labelsTs"),
            str(folder / site.name / "predictions"),
            "-np",
            "1",
            "-l",
            *[str(value) for value in LABELS.values() if value],
        ],
    )
    summaries = {site.name: folder / site.name / "predictions" / "summary.json" for site in sites}
    picture = save_picture(
        {site.name: (dataset_folder(site, "nnUNet_raw"), folder / site.name / "predictions") for site in sites},
        folder / "predictions.png",
    )
    print_table(summaries, LABELS)
    print(f"\nPicture: {picture}\nModel of all sites: {model}\nTime: {(time.monotonic() - start) / 60:.1f} min")
    return all(mean_dice(summary) >= WANTED_DICE for summary in summaries.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo-output"), help="emptied first (default: %(default)s)")
    parser.add_argument("--secure", action="store_true", help="mask updates and statistics: make demo SECURE=1")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    marker = folder / "made-by-the-demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        parser.error(f"{folder} holds other files; name an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    reached = run(folder, is_secure=arguments.secure)
    if not reached:
        print(f"A site stayed below a mean Dice of {WANTED_DICE}.")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
