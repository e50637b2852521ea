"""Measure evaluation, postprocessing and ensembling against the reference release, in one run.

    python benchmarks/evaluation.py                 # 50 pairs with 25 labels, 12 cases with 5, 8 cases of 2 models
    python benchmarks/evaluation.py --only ensemble --repeats 5

Both sides run the same commands on the same files with the same number of processes (-np), turn by turn, each in a
fresh process; seconds are those that a user waits, medians over the repeats. Memory is the peak of the resident memory
of a command and all its workers together, sampled every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Task:
    """A command, and the data that it works on."""

    entry: str
    """module:function of its entry point, the same on both sides."""
    make: Callable[[Path, argparse.Namespace], None]
    arguments: Callable[[Path, Path], list[str]]
    """(data, output folder) -> arguments."""


def draw_labels(rng: np.random.Generator, shape: Sequence[int], labels: int) -> np.ndarray:
    """Draw overlapping ellipsoids, some islands included."""
    volume = np.zeros(shape, dtype=np.uint8)
    grid = np.ogrid[tuple(slice(0, 1, n * 1j) for n in shape)]
    for label in range(1, labels + 1):
        for radius in (0.16, 0.03):
            centre = rng.uniform(0.15, 0.85, 3)
            distance = sum(((axis - c) / (radius * rng.uniform(0.7, 1.3))) ** 2 for axis, c in zip(grid, centre))
            volume[distance < 1] = label
    return volume


def write_labels(path: Path, labels: np.ndarray) -> None:
    import SimpleITK as sitk

    sitk.WriteImage(sitk.GetImageFromArray(labels), str(path), True)


def write_dataset(folder: Path, labels: int) -> None:
    names = {"background": 0, **{f"class {number}": number for number in range(1, labels + 1)}}
    dataset_json = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": 1, "file_ending": ".nii.gz"}
    plans = {
        "dataset_name": "Dataset996_Benchmark",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "configurations": {},
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (folder / "plans.json").write_text(json.dumps(plans))


def make_pairs(folder: Path, cases: int, labels: int, shape: Sequence[int]) -> None:
    """Write references, and predictions in which each label is a little displaced."""
    rng = np.random.default_rng(0)
    for name in ("references", "predictions"):
        (folder / name).mkdir(parents=True)
    for number in range(cases):
        reference = draw_labels(rng, shape, labels)
        write_labels(folder / "references" / f"case_{number:02}.nii.gz", reference)
        write_labels(folder / "predictions" / f"case_{number:02}.nii.gz", np.roll(reference, 2, axis=1))
    write_dataset(folder / "predictions", labels)


def make_evaluation(folder: Path, options: argparse.Namespace) -> None:
    make_pairs(folder, options.pairs, 25, options.shape)


def make_postprocessing(folder: Path, options: argparse.Namespace) -> None:
    make_pairs(folder, options.cases, 5, options.shape)


def make_ensemble(folder: Path, options: argparse.Namespace) -> None:
    """Write smooth probabilities of two models."""
    from scipy.ndimage import zoom

    rng = np.random.default_rng(0)
    classes, coarse = 10, [max(2, n // 8) for n in options.shape]
    for model in ("model_1", "model_2"):
        target = folder / model
        target.mkdir(parents=True)
        write_dataset(target, classes - 1)
        for number in range(options.ensemble_cases):
            logits = np.stack(
                [zoom(rng.normal(0, 4, coarse), np.divide(options.shape, coarse), order=1) for _ in range(classes)]
            )
            probabilities = np.exp(logits - logits.max(0))
            probabilities = (probabilities / probabilities.sum(0)).astype(np.float32)
            np.savez_compressed(target / f"case_{number}.npz", probabilities=probabilities)
            write_properties(target / f"case_{number}.pkl", options.shape)


def write_properties(path: Path, shape: Sequence[int]) -> None:
    import pickle

    stuff = {"spacing": (1.0, 1.0, 1.0), "origin": (0.0, 0.0, 0.0), "direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)}
    path.write_bytes(pickle.dumps({"sitk_stuff": stuff, "spacing": [1.0, 1.0, 1.0], "shape_before_cropping": shape}))


TASKS = {
    "evaluate": Task(
        "nnunetv2.evaluation.evaluate_predictions:evaluate_folder_entry_point",
        make_evaluation,
        lambda data, out: [
            data / "references",
            data / "predictions",
            "-djfile",
            data / "predictions/dataset.json",
            "-pfile",
            data / "predictions/plans.json",
            "-o",
            out / "summary.json",
        ],
    ),
    "postprocessing": Task(
        "nnunetv2.postprocessing.remove_connected_components:entry_point_determine_postprocessing_folder",
        make_postprocessing,
        lambda data, out: ["-i", out / "predictions", "-ref", data / "references"],
    ),
    "ensemble": Task(
        "nnunetv2.ensembling.ensemble:entry_point_ensemble_folders",
        make_ensemble,
        lambda data, out: ["-i", data / "model_1", data / "model_2", "-o", out / "merged"],
    ),
}


def run(python: Path, task: Task, data: Path, out: Path, processes: int) -> tuple[float, float]:
    """Run a command once; return seconds and GB."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if (data / "predictions").is_dir():
        shutil.copytree(data / "predictions", out / "predictions")
    module, function = task.entry.split(":")
    script = out / "command.py"
    # Spawned workers import the script anew, hence the guard.
    script.write_text(f"if __name__ == '__main__':\n    from {module} import {function}\n    {function}()\n")
    command = [python, script, *task.arguments(data, out), "-np", processes]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **{f"nnUNet_{root}": str(out) for root in ("raw", "preprocessed", "results")},
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        cwd=out,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = _Memory(process.pid)
    output, _ = process.communicate(timeout=1800)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{task.entry} failed with {python}:\n{output[-3000:]}")
    return seconds, watch.stop() / 1e9


class _Memory:
    """Samples the resident memory of a process group."""

    def __init__(self, group: int) -> None:
        self._group, self._peak, self._done = group, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._peak = max(self._peak, sum(map(self._resident, Path("/proc").glob("[0-9]*"))))

    def _resident(self, process: Path) -> int:
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
            return int(fields[21]) * PAGE if int(fields[2]) == self._group else 0
        except OSError:  # it has just ended
            return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=3, default=[64, 160, 160])
    parser.add_argument("--pairs", type=int, default=50, help="cases to evaluate, with 25 labels")
    parser.add_argument("--cases", type=int, default=12, help="cases to determine postprocessing from, with 5 labels")
    parser.add_argument("--ensemble-cases", type=int, default=8, help="cases to ensemble, with 10 classes")
    parser.add_argument("-np", type=int, default=2, help="processes of either side")
    parser.add_argument("--reference", type=Path, default=PROJECT / ".venv-reference/bin/python")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    sides = {"reference": options.reference, "ours": Path(sys.executable)}
    print(f"load {os.getloadavg()[0]:.1f}, {options.np} processes, shape {options.shape}", flush=True)
    print(
        f"{'':18}{'seconds':>20}{'':>9}{'memory GB':>20}\n{'':18}{'reference':>11}{'ours':>9}{'ratio':>9}"
        f"{'reference':>11}{'ours':>9}{'ratio':>9}",
        flush=True,
    )
    with TemporaryDirectory() as folder:
        for name in options.only:
            data, figures = Path(folder, name), {side: [] for side in sides}
            data.mkdir()
            TASKS[name].make(data, options)
            for _ in range(options.repeats):
                for side, python in sides.items():
                    figures[side].append(run(python, TASKS[name], data, Path(folder, f"{name}_{side}"), options.np))
            cells = []
            for number in range(2):
                theirs, ours = (statistics.median(pair[number] for pair in figures[side]) for side in sides)
                cells.append(f"{theirs:11.2f}{ours:9.2f}{theirs / ours:9.1f}")
            print(f"{name:18}{''.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
