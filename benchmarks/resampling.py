"""Measure resampling against scikit-image and batchgenerators, which the reference release calls, in one run.

    python benchmarks/resampling.py                 # 200x400x400 -> 250x500x500, as measured in the documentation
    python benchmarks/resampling.py --scale 0.3     # a smaller volume, seconds instead of minutes

Each function runs in a fresh process with one thread; times are medians. Memory is the peak of what it allocates in a
run of its own, result included, input not.
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

OLD, NEW, LABELS = (200, 400, 400), (250, 500, 500), 10


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="scale every side of the volume")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each function; the median counts")
    parser.add_argument("--only", choices=sorted(TASKS), help=argparse.SUPPRESS)
    return parser


def make_image(shape: Sequence[int]):
    import numpy as np
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def make_labels(shape: Sequence[int]):
    """Nine overlapping ellipsoids in background."""
    import numpy as np
    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.int8)
    grid = np.ogrid[tuple(slice(0, 1, n * 1j) for n in shape)]
    for label in range(1, LABELS):
        centre, radius = rng.uniform(0.2, 0.8, 3), rng.uniform(0.08, 0.25, 3)
        labels[sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radius)) < 1] = label
    return labels


def ours(order: int, is_seg: bool) -> Callable:
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg
    return lambda array, new: resample_data_or_seg(array[None], new, is_seg, order=order)[0]


def scikit_image(order: int) -> Callable:
    import numpy as np
    from skimage.transform import resize
    return lambda array, new: resize(array.astype(np.float64), new, order, mode="edge",
                                     anti_aliasing=False).astype(array.dtype)


def batchgenerators_labels() -> Callable:
    from batchgenerators.augmentations.utils import resize_segmentation
    return lambda array, new: resize_segmentation(array, new, 1)


TASKS = {
    "image, cubic: scikit-image": (make_image, lambda: scikit_image(3)),
    "image, cubic: ours": (make_image, lambda: ours(3, False)),
    "image, linear: scikit-image": (make_image, lambda: scikit_image(1)),
    "image, linear: ours": (make_image, lambda: ours(1, False)),
    "labels, linear: batchgenerators": (make_labels, batchgenerators_labels),
    "labels, linear: ours": (make_labels, lambda: ours(1, True)),
}


def measure(task: str, scale: float, repeats: int) -> dict:
    """Run one function in this process."""
    make, build = TASKS[task]
    old, new = ([max(1, round(n * scale)) for n in shape] for shape in (OLD, NEW))
    array, function = make(old), build()
    function(array[:8, :8, :8], (10, 10, 10))  # imports and first calls
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(array, new)
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()  # NumPy reports its arrays to it, and SciPy's are NumPy's
    function(array, new)
    return {"seconds": statistics.median(seconds), "memory_gb": tracemalloc.get_traced_memory()[1] / 1e9}


def measure_elsewhere(task: str, scale: float, repeats: int) -> dict:
    """Run one function in a fresh process, so that memory and caches are its own."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--only", task, "--scale", str(scale), "--repeats", str(repeats)]
    done = subprocess.run(command, env={**os.environ, **threads}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.scale, arguments.repeats)))
        return 0
    print(f"{'':34}{'seconds':>9}{'memory GB':>11}{'faster':>9}{'memory ratio':>14}")
    pairs = list(TASKS)
    for baseline_task, our_task in zip(pairs[::2], pairs[1::2]):
        baseline = measure_elsewhere(baseline_task, arguments.scale, arguments.repeats)
        print(f"{baseline_task:34}{baseline['seconds']:9.2f}{baseline['memory_gb']:11.2f}", flush=True)
        result = measure_elsewhere(our_task, arguments.scale, arguments.repeats)
        faster = baseline["seconds"] / result["seconds"]
        leaner = baseline["memory_gb"] / max(result["memory_gb"], 1e-3)
        print(f"{our_task:34}{result['seconds']:9.2f}{result['memory_gb']:11.2f}{faster:8.1f}x{leaner:13.1f}x",
              flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
