"""Measure prediction against the reference release, in one run: the export of logits, and whole commands on a CPU.

    python benchmarks/inference.py                       # both parts; about 20 minutes on two cores
    python benchmarks/inference.py --part export         # 25 classes, 150x256x256 -> 300x512x512
    python benchmarks/inference.py --part predict        # five CT-like volumes, from files to files

Each measurement is a fresh process; ours and the reference take turns, and medians count. Memory is the peak of all
processes of a measurement together (proportional set size), libraries and logits included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from benchmarks.phantom_dataset import draw_ellipsoids, scaled, write_nifti  # noqa: E402
from benchmarks.process_tree import measure  # noqa: E402

LOGITS, IMAGE, CLASSES = (150, 256, 256), (300, 512, 512), 25
CASES, VOLUME, SPACING = 5, (36, 110, 110), (3.0, 1.5, 1.5)
PATCH, FEATURES = (40, 96, 96), (16, 32, 64, 128)
LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "vessel": 4}

EXPORT = """
import json, sys, time
import numpy as np, torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

folder, result = sys.argv[1:3]
case = json.load(open(folder + "/case.json"))
plans = PlansManager(case["plans"])
labels = plans.get_label_manager(case["dataset_json"])
logits = torch.from_numpy(np.load(folder + "/logits.npy"))
begin = time.perf_counter()
segmentation = convert(logits, plans, plans.get_configuration("3d_fullres"), labels, case["properties"])
print("SECONDS", time.perf_counter() - begin)
np.save(result, segmentation)
"""


@dataclass(frozen=True)
class Way:
    """One of the things that are compared."""

    name: str
    python: Path
    environment: Mapping[str, str]

    def command(self, program: str) -> str:
        return str(self.python.parent / program)


def ways(reference: Path, threads: int) -> list[Way]:
    common = {"OMP_NUM_THREADS": str(threads), "nnUNet_compile": "f"}
    ours = Path(sys.executable)
    return [
        Way("reference", reference / "bin" / "python", common),
        Way("ours, float32", ours, {**common, "nnUNet_cpu_autocast": "0"}),
        Way("ours, bfloat16", ours, {**common, "nnUNet_cpu_autocast": "1"}),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("export", "predict"), help="measure only this")
    parser.add_argument("--scale", type=float, default=1.0, help="scale every side of the volumes")
    parser.add_argument("--classes", type=int, default=CLASSES, help="of the export")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--reference", type=Path, default=PROJECT / ".venv-reference", help="virtual environment")
    return parser


def measure_export(arguments: argparse.Namespace, folder: Path) -> None:
    write_export_case(folder, arguments.classes, arguments.scale)

    def run(way: Way, result: Path) -> tuple[float, float]:
        done = measure([str(way.python), "-c", EXPORT, str(folder), str(result)], way.environment)
        return float(done.output.split("SECONDS")[1].split()[0]), done.peak_mb

    reference, ours, _ = ways(arguments.reference, arguments.threads)
    old, new = (scaled(shape, arguments.scale) for shape in (LOGITS, IMAGE))
    heading = f"export, {arguments.classes} classes, {old} -> {new}"
    results = compare(heading, [reference, ours], run, folder, arguments.repeats)
    report_agreement([np.load(path) for path in results[0]], [np.load(path) for path in results[1]])


def write_export_case(folder: Path, classes: int, scale: float) -> None:
    from tiny_models import TinyModel

    old, new = scaled(LOGITS, scale), scaled(IMAGE, scale)
    model = TinyModel(spacing=(2.0, 1.5, 1.5))
    dataset_json = model.dataset_json()
    dataset_json["labels"] = {"background": 0, **{f"class {i}": i for i in range(1, classes)}}
    (folder / "case.json").write_text(
        json.dumps(
            {
                "plans": model.plans(),
                "dataset_json": dataset_json,
                "properties": {
                    "spacing": [1.0, 0.75, 0.75],
                    "shape_before_cropping": new,
                    "bbox_used_for_cropping": [[0, n] for n in new],
                    "shape_after_cropping_and_before_resampling": new,
                },
            }
        )
    )
    np.save(folder / "logits.npy", draw_logits(classes, old))


def draw_logits(classes: int, shape: Sequence[int]) -> np.ndarray:
    """Balls of one class each: a logit falls with the distance from the centre of its ball."""
    rng = np.random.default_rng(0)
    grid = np.ogrid[tuple(slice(0, 1, n * 1j) for n in shape)]
    logits = np.zeros((classes, *shape), dtype=np.float16)
    for channel in logits[1:]:
        centre, radius = rng.uniform(0.1, 0.9, 3), rng.uniform(0.05, 0.2)
        channel[...] = 20 * (radius - np.sqrt(sum((axis - c) ** 2 for axis, c in zip(grid, centre))))
    return logits


def measure_predict(arguments: argparse.Namespace, folder: Path) -> None:
    write_predict_cases(folder, arguments.scale)

    def run(way: Way, result: Path) -> tuple[float, float]:
        done = measure(
            [
                way.command("nnUNetv2_predict_from_modelfolder"),
                "-i",
                str(folder / "images"),
                "-o",
                str(result),
                "-m",
                str(folder / "model"),
                "-f",
                "0",
                "-device",
                "cpu",
                "--disable_progress_bar",
            ],
            way.environment,
        )
        return done.seconds, done.peak_mb

    compared = ways(arguments.reference, arguments.threads)
    heading = f"predict {CASES} volumes of about {scaled(VOLUME, arguments.scale)}, mirroring on"
    results = compare(heading, compared, run, folder, arguments.repeats)
    for result in results[1:]:
        report_agreement(
            *([read_labels(path) for path in sorted(Path(one[0]).glob("*.nii.gz"))] for one in (results[0], result))
        )


def write_predict_cases(folder: Path, scale: float) -> None:
    """Write five scans of bodies in air and a model of four stages that resamples them to coarser voxels."""
    from tiny_models import TinyModel, write_model

    (folder / "images").mkdir()
    for case in range(CASES):
        rng = np.random.default_rng(case)
        shape = scaled([n + 4 * case for n in VOLUME], scale)
        image = draw_ellipsoids(shape, len(LABELS), rng) * 60.0 + rng.normal(0, 15, shape)
        grid = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
        image[(grid[1] / 0.9) ** 2 + (grid[2] / 0.95) ** 2 + 0 * grid[0] > 1] = -1000
        write_nifti(image.astype(np.int16), folder / "images" / f"ct_{case}_0000.nii.gz", SPACING[::-1])
    model = TinyModel(
        patch_size=(16, 32, 32), spacing=(3.0, 1.8, 1.8), labels=LABELS, channels=("CT",), features=FEATURES, lessons=30
    )
    write_model(folder / "model", model)
    # The lessons are quick with a small patch; the network takes any.
    plans = dataclasses.replace(model, patch_size=PATCH).plans()
    (folder / "model" / "plans.json").write_text(json.dumps(plans))


def read_labels(path: Path) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def compare(
    heading: str, compared: Sequence[Way], run: Callable[[Way, Path], tuple[float, float]], folder: Path, repeats: int
) -> list[list[Path]]:
    """Let the ways take turns, print the medians, and return where each wrote its results.

    Beside seconds on the clock there is the time of all cores, imports included: on a busy machine it says more.
    """
    figures: list[list[tuple[float, float, float]]] = [[] for _ in compared]
    results: list[list[Path]] = [[] for _ in compared]
    for repeat in range(repeats):
        for number, way in enumerate(compared):
            results[number].append(folder / f"result_{number}_{repeat}.npy")
            before = _cpu_seconds()
            seconds, peak_mb = run(way, results[number][-1])
            figures[number].append((seconds, _cpu_seconds() - before, peak_mb))
            print(f"{way.name}: {figures[number][-1][0]:.2f} s", file=sys.stderr, flush=True)
    medians = [[statistics.median(values) for values in zip(*pairs)] for pairs in figures]
    ratios = [[first / own for first, own in zip(medians[0], row)] for row in medians]
    print(
        f"{heading} (load {os.getloadavg()[0]:.1f})\n{'':18}{'seconds':>9}{'cpu s':>8}{'peak MB':>9}"
        f"   times less: {'seconds':>8}{'cpu s':>7}{'memory':>8}"
    )
    for way, figure, ratio in zip(compared, medians, ratios):
        print(
            f"{way.name:18}{figure[0]:9.2f}{figure[1]:8.1f}{figure[2]:9.0f}{'':15}{ratio[0]:8.2f}{ratio[1]:7.1f}"
            f"{ratio[2]:8.1f}"
        )
    return results


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report_agreement(theirs: Sequence[np.ndarray], mine: Sequence[np.ndarray]) -> None:
    equal = sum(np.count_nonzero(a == b) for a, b in zip(theirs, mine))
    print(f"{100 * equal / sum(a.size for a in theirs):.3f} % of voxels with the same label", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    for part, function in (("export", measure_export), ("predict", measure_predict)):
        if arguments.part in (None, part):
            with TemporaryDirectory() as folder:
                function(arguments, Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
