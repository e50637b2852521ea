"""Planning, listing and help against the reference: functions in one process each, commands as a user runs them.

    python -m benchmarks.planning [--folder FOLDER] [--repeats N] [--parts planning listing help]

Both sides take turns; medians are printed as rows of RESULTS.md. FEDNNUNET_REFERENCE names the environment of the
reference release (default: .venv-reference).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
ENDING = ".nii.gz"
DATASETS = {  # name -> spacings, shapes, training cases, channels
    "liver (CT, low resolution)": (
        [[1, 0.7676, 0.7676]] * 5 + [[0.7, 0.8, 0.8]] * 4,
        [[432, 512, 512]] * 9,
        131,
        ["CT"],
    ),
    "prostate (thick slices)": ([[3.6, 0.625, 0.625]], [[20, 320, 319]], 32, ["T2", "ADC"]),
    "roads (2d)": ([[999, 1, 1]], [[1, 1500, 1500]], 770, ["R", "G", "B"]),
}
PLANNERS = {
    "ExperimentPlanner": "default_experiment_planner",
    "nnUNetPlannerResEncL": "residual_unets.residual_encoder_unet_planners",
}
PARTS = ("planning", "listing", "help")

PLAN = """
import contextlib, importlib, io, sys, time, warnings
warnings.simplefilter("ignore")
base = "nnunetv2.experiment_planning.experiment_planners."
importlib.import_module(base + "default_experiment_planner").ExperimentPlanner.determine_reader_writer = \\
    lambda self: type("SimpleITKIO", (), {})
planner = getattr(importlib.import_module(base + sys.argv[2]), sys.argv[1])
seconds = []
for _ in range(3):
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        planner(sys.argv[3]).plan_experiment()
        seconds.append(time.perf_counter() - start)
print(sorted(seconds)[1])
"""
LIST = """
import sys, time
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
if __name__ == "__main__":
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(get_filenames_of_train_images_and_targets(sys.argv[1])) == 3000
        seconds.append(time.perf_counter() - start)
    print(sorted(seconds)[1])
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="Where to work. Default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args(argv)
    reference = Path(os.environ.get("FEDNNUNET_REFERENCE", PROJECT / ".venv-reference")) / "bin" / "python"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        benchmark = Benchmark(Path(folder), {"ours": Path(sys.executable), "reference": reference}, arguments.repeats)
        print("| what | reference | ours | ratio |\n|---|---|---|---|")
        for part in arguments.parts:
            getattr(benchmark, f"compare_{part}")()


class Benchmark:
    """Two interpreters, with folders of their own, that do the same in turns."""

    def __init__(self, folder: Path, pythons: dict[str, Path], repeats: int) -> None:
        self.folder, self.pythons, self.repeats = folder, pythons, repeats
        self.names = [f"Dataset{number:03d}_Made" for number in range(1, len(DATASETS) + 1)]
        for side in pythons:
            for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
                (folder / side / root).mkdir(parents=True)
            for name, dataset in zip(self.names, DATASETS.values()):
                write_planned_dataset(folder / side, name, *dataset)

    def compare_planning(self) -> None:
        for planner, module in PLANNERS.items():
            for name, title in zip(self.names, DATASETS):
                self._report(
                    f"planning: {title}, {planner}",
                    lambda side, of=(planner, module, name): float(self._run(side, "-c", PLAN, *of)),
                )

    def compare_listing(self) -> None:
        raw = self.folder / "listing"
        (raw / "imagesTr").mkdir(parents=True)
        for case in range(3000):
            (raw / "imagesTr" / f"case_{case:05d}_0000{ENDING}").touch()
        (raw / "dataset.json").write_text(json.dumps({"file_ending": ENDING}))
        script = self.folder / "listing.py"
        script.write_text(LIST)
        self._report("listing 3,000 files", lambda side: float(self._run(side, str(script), str(raw))))

    def compare_help(self) -> None:
        for name in sorted(file.name for file in self.pythons["reference"].parent.glob("nnUNetv2_*")):
            self._report(f"`{name} -h`", lambda side, name=name: self._time(side, name, "-h"))

    def _report(self, what: str, measure: Callable[[str], float]) -> None:
        seconds: dict[str, list[float]] = {side: [] for side in self.pythons}
        for _ in range(self.repeats):
            for side in self.pythons:
                seconds[side].append(measure(side))
        ours, theirs = (statistics.median(seconds[side]) for side in ("ours", "reference"))
        print(f"| {what} | {theirs:.3g} s | {ours:.3g} s | {theirs / ours:.1f} |", flush=True)

    def _run(self, side: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.pythons[side]), *arguments],
            env=self._environment(side),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{side}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout.split()[-1]

    def _time(self, side: str, command: str, *arguments: str) -> float:
        program = self.pythons[side].parent / command
        start = time.perf_counter()
        subprocess.run(
            [str(program), *arguments], env=self._environment(side), cwd=self.folder, capture_output=True, check=True
        )
        return time.perf_counter() - start

    def _environment(self, side: str) -> dict[str, str]:
        roots = {
            root: str(self.folder / side / root) for root in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        }
        return {**os.environ, **roots, "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "1"}


def write_planned_dataset(
    folder: Path, name: str, spacings: list, shapes: list, num_training: int, channels: list[str]
) -> None:
    """Write dataset.json and a fingerprint, which is all that planning reads."""
    dataset_json = {
        "channel_names": {str(i): channel for i, channel in enumerate(channels)},
        "labels": {"background": 0, "organ": 1, "tumour": 2},
        "numTraining": num_training,
        "file_ending": ENDING,
        "dataset": {"case": {"images": ["absent"], "label": "absent"}},
    }
    fingerprint = {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
    }
    for root, file, content in (
        ("nnUNet_raw", "dataset.json", dataset_json),
        ("nnUNet_preprocessed", "dataset_fingerprint.json", fingerprint),
    ):
        (folder / root / name).mkdir()
        (folder / root / name / file).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
