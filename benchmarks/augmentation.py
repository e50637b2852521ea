"""Measure how many augmented samples per second one process delivers, beside the reference release.

Both read the same cases (.b2nd) and draw the same random numbers, so each round does the same work twice: once here,
once in the reference's own environment, each set up as its workers are. The rounds alternate; medians are compared.
Time is the processor time of the process, all its threads: other jobs on the machine disturb it little.

    python -m benchmarks.augmentation                 # 3d, 2d and thin patches
    python -m benchmarks.augmentation --task 3d --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
REFERENCE = Path(os.environ.get("FEDNNUNET_REFERENCE", PROJECT / ".venv-reference")) / "bin" / "python"


@dataclass(frozen=True)
class Task:
    """The data that is loaded and augmented."""

    shape: tuple[int, int, int]
    patch: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    """Of the network's stages: they give the scales of deep supervision."""
    batch_size: int
    batches: int
    """Number of batches in a round."""
    num_labels: int = 3
    masked: bool = False
    """Set voxels outside the non-zero mask to 0, as for MR images."""


TASKS = {
    "3d": Task((150, 300, 300), (128, 128, 128), ((1, 1, 1),) + ((2, 2, 2),) * 5, 2, 12),
    "3d_mr": Task((160, 190, 180), (128, 128, 128), ((1, 1, 1),) + ((2, 2, 2),) * 5, 2, 12, masked=True),
    "thin": Task((30, 400, 400), (20, 320, 256), ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)), 2, 12),
    "2d": Task((60, 600, 600), (512, 512), ((1, 1),) + ((2, 2),) * 7, 12, 6),
    "2d_small": Task((150, 300, 300), (256, 192), ((1, 1),) + ((2, 2),) * 5, 40, 6),
}

WANTED = {name: 3.0 if task.patch == (128, 128, 128) else 2.0 for name, task in TASKS.items()}
"""Samples per second, relative to the reference."""

# Runs in either environment: builds a loader, then answers each line "seed number" with the CPU seconds it took.
WORKER = """
import json, random, sys, time
import numpy as np
import torch
torch.set_num_threads(1)
try:  # as in our workers; the reference has nothing like it
    from nnunetv2.training.data_augmentation.augmenters import prepare_worker
    prepare_worker()
except ImportError:
    pass
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

task = json.loads(sys.argv[1])
patch = task["patch"]
dummy_2d = len(patch) == 3 and max(patch) / patch[0] > 3
flat = len(patch) == 2
degrees = (180 if dummy_2d else 30) if not flat else (15 if max(patch) / min(patch) > 1.5 else 180)
angle = degrees / 180 * np.pi
rotation = (-angle, angle)
initial = get_patch_size(patch, rotation, rotation, rotation, (0.85, 1.25))
if dummy_2d:
    initial[0] = patch[0]
scales = [list(scale) for scale in 1 / np.cumprod(np.vstack(task["strides"]), axis=0)][:-1]
manager = LabelManager({"background": 0, **{f"l{i}": i for i in range(1, task["num_labels"])}}, None)
transforms = nnUNetTrainer.get_training_transforms(
    patch, rotation, scales, tuple(range(len(patch))), dummy_2d, use_mask_for_norm=[task["masked"]])
loader = nnUNetDataLoader(nnUNetDatasetBlosc2(task["folder"]), task["batch_size"], initial, patch, manager, 0.33,
                          None, None, False, transforms)
print("ready", flush=True)
for line in sys.stdin:
    seed, number = map(int, line.split())
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    start = time.process_time()
    for _ in range(number):
        next(loader)
    print(time.process_time() - start, flush=True)
"""


class LoaderProcess:
    """A loader in a Python of its own, asked for batches one round after the other."""

    def __init__(self, python: Path, task: Task, folder: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "nnUNet_compile": "f"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [str(python), "-c", WORKER, json.dumps({**vars(task), "folder": str(folder)})],
            text=True,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        while self._read_line() != "ready":
            pass  # imports may print

    def seconds_for(self, number: int, seed: int) -> float:
        """Return the processor time that a number of batches took."""
        self._process.stdin.write(f"{seed} {number}\n")
        self._process.stdin.flush()
        return float(self._read_line())

    def _read_line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the loader ended with status {self._process.wait()}; see its messages above")
        return line.strip()

    def __enter__(self) -> LoaderProcess:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.wait(20)


def write_cases(folder: Path, task: Task, number: int = 3) -> None:
    """Write phantoms: smooth noise with ellipsoids in it, and air around."""
    from scipy.ndimage import zoom

    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    rng = np.random.default_rng(0)
    for case in range(number):
        coarse = rng.normal(size=[max(2, -(-length // 8)) for length in task.shape])
        image = zoom(coarse, np.divide(task.shape, coarse.shape), order=1).astype(np.float32)
        image += rng.normal(scale=0.3, size=task.shape).astype(np.float32)
        seg, locations = _draw_labels(task, rng)
        image[seg == -1] = 0
        blocks, chunks = comp_blosc2_params((1, *task.shape), task.patch, 4)
        blocks_seg, chunks_seg = comp_blosc2_params((1, *task.shape), task.patch, 1)
        nnUNetDatasetBlosc2.save_case(
            image[None],
            seg[None],
            {"class_locations": locations},
            str(folder / f"case_{case}"),
            chunks=chunks,
            blocks=blocks,
            chunks_seg=chunks_seg,
            blocks_seg=blocks_seg,
        )


def _draw_labels(task: Task, rng: np.random.Generator) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, length) for length in task.shape), indexing="ij"))
    seg = np.zeros(task.shape, np.int8)
    for label in range(1, task.num_labels):
        centre, radius = rng.uniform(-0.4, 0.4, 3), rng.uniform(0.2, 0.4, 3)
        seg[(((grid.T - centre) / radius).T ** 2).sum(0) < 1] = label
    if task.masked:
        seg[(grid**2).sum(0) > 1] = -1
    locations = {}
    for label in range(1, task.num_labels):
        voxels = np.argwhere(seg == label)
        voxels = voxels[rng.choice(len(voxels), min(10_000, len(voxels)), replace=False)]
        locations[label] = np.concatenate([np.zeros((len(voxels), 1), int), voxels], 1)
    return seg, locations


def measure(name: str, rounds: int = 5, *, reference: Path = REFERENCE) -> dict[str, float]:
    """Run a task in both environments, alternately.

    Returns:
        Samples per second on one core, `ours` and `reference`, and the `ratio` of the medians.
    """
    task = TASKS[name]
    with tempfile.TemporaryDirectory(prefix="augmentation-") as folder:
        write_cases(Path(folder), task)
        with (
            LoaderProcess(Path(sys.executable), task, Path(folder)) as ours,
            LoaderProcess(reference, task, Path(folder)) as theirs,
        ):
            seconds = _alternate(ours, theirs, task.batches, rounds)
    samples = task.batches * task.batch_size
    our_median, their_median = (median(column) for column in zip(*seconds))
    return {"ours": samples / our_median, "reference": samples / their_median, "ratio": their_median / our_median}


def _alternate(ours: LoaderProcess, theirs: LoaderProcess, batches: int, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds of each round, here and there, without a first one that fills caches and times kernels."""
    seconds = []
    for seed in range(rounds + 1):
        pair = [ours.seconds_for(batches, seed), theirs.seconds_for(batches, seed)]
        seconds.append(tuple(pair))
    return seconds[1:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), nargs="+", default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    print("| task | patch | reference, samples/s | here, samples/s | ratio |\n|---|---|---|---|---|")
    for name in options.task:
        result = measure(name, options.rounds)
        patch = "x".join(map(str, TASKS[name].patch))
        print(
            f"| {name} | {patch} | {result['reference']:.2f} | {result['ours']:.2f} | {result['ratio']:.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
