"""Measure the way from logits to a label map against a loop of scikit-image over classes, in one run.

    python benchmarks/export.py                              # 25 classes, 96x160x160 -> 144x240x240
    python benchmarks/export.py --classes 118 --scale 0.5    # as many classes as a whole-body model, a smaller volume

The baseline is what the default resampling of the reference release amounts to: every class in float64, back to
float16, then argmax. Each way runs in a fresh process with one thread; times are medians. Memory is the peak of what a
run of its own allocates, result included, logits not.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

OLD, NEW = (96, 160, 160), (144, 240, 240)

Export = Callable[[np.ndarray, Sequence[int]], np.ndarray]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=25)
    parser.add_argument("--scale", type=float, default=1.0, help="scale every side of the volume")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way; the median counts")
    parser.add_argument("--only", choices=sorted(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def make_logits(classes: int, shape: Sequence[int]) -> np.ndarray:
    """Balls of one class each: a logit falls with the distance from the centre of its ball."""
    rng = np.random.default_rng(0)
    grid = np.ogrid[tuple(slice(0, 1, n * 1j) for n in shape)]
    logits = np.zeros((classes, *shape), dtype=np.float16)
    for channel in logits[1:]:
        centre, radius = rng.uniform(0.1, 0.9, 3), rng.uniform(0.05, 0.2)
        distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(grid, centre)))
        channel[...] = 20 * (radius - distance)
    return logits


def scikit_image() -> Export:
    from skimage.transform import resize

    def export(logits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        resized = np.empty((len(logits), *shape), dtype=logits.dtype)
        for channel, out in zip(logits.astype(np.float64), resized):
            out[...] = resize(channel, shape, 1, mode="edge", anti_aliasing=False)
        return resized.argmax(0).astype(np.uint8)
    return export


def ours() -> Export:
    from nnunetv2.inference.logit_resampling import GridChange, write_labels
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    def export(logits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        names = {"background": 0, **{f"class {i}": i for i in range(1, len(logits))}}
        labels = np.zeros(shape, dtype=np.uint8)
        write_labels(logits, GridChange(tuple(shape)), LabelManager(names, None), labels)
        return labels
    return export


WAYS = {"scikit-image, class by class": scikit_image, "ours, in slabs": ours}


def measure(way: str, classes: int, scale: float, repeats: int, result: Path) -> dict:
    """Run one way in this process and save its label map."""
    old, new = (tuple(max(2, round(n * scale)) for n in shape) for shape in (OLD, NEW))
    logits, export = make_logits(classes, old), WAYS[way]()
    export(logits[:, :4, :4, :4], (6, 6, 6))  # imports and first calls
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        labels = export(logits, new)
        seconds.append(time.perf_counter() - start)
    np.save(result, labels)
    del labels
    tracemalloc.start()  # NumPy reports its arrays to it, and SciPy's are NumPy's
    export(logits, new)
    return {"seconds": statistics.median(seconds), "memory_gb": tracemalloc.get_traced_memory()[1] / 1e9}


def measure_elsewhere(way: str, arguments: argparse.Namespace, result: Path) -> dict:
    """Run one way in a fresh process, so that memory and caches are its own."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--only", way, "--classes", arguments.classes, "--scale", arguments.scale,
               "--repeats", arguments.repeats, "--result", result]
    done = subprocess.run([str(part) for part in command], env={**os.environ, **threads}, check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.classes, arguments.scale, arguments.repeats,
                                 arguments.result)))
        return 0
    with TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.npy") for number, _ in enumerate(WAYS)]
        baseline, result = (measure_elsewhere(way, arguments, file) for way, file in zip(WAYS, files))
        agreement = np.mean(np.load(files[0]) == np.load(files[1]))
    print(f"{arguments.classes} classes{'':19}{'seconds':>9}{'memory GB':>11}")
    for way, figures in zip(WAYS, (baseline, result)):
        print(f"{way:30}{figures['seconds']:9.2f}{figures['memory_gb']:11.3f}")
    print(f"{baseline['seconds'] / result['seconds']:.1f} times as fast, "
          f"{baseline['memory_gb'] / result['memory_gb']:.0f} times less memory, "
          f"{100 * agreement:.3f} % of voxels with the same label")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
