"""Measure everything before training against the reference release, side by side in one run.

    python benchmarks/preprocessing.py --reference .venv-reference/bin/python
    python benchmarks/preprocessing.py --reference .venv-reference/bin/python --scale 0.3 --repeats 1   # a quick look

Both packages work on the same files, with the same number of processes, in turn: ours, the reference, ours, ...
Medians count. Resampling, listing and planning are timed inside a fresh Python, the rest as whole commands with all
their processes. Prints a table in Markdown; it takes about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path.insert(0, str(PROJECT))

from benchmarks.phantom_dataset import DATASET, write_ct_dataset, write_many_names, write_resampling_volumes  # noqa: E402  (the line above makes it importable)
from benchmarks.process_tree import Measured, measure  # noqa: E402

TASKS_FILE = Path(__file__).with_name("preprocessing_tasks.py")
COMMAND_NAMES = """import json, importlib.metadata as m
print(json.dumps(sorted(e.name for e in m.distribution('nnunetv2').entry_points if e.group == 'console_scripts')))"""
SIDES = ("ours", "reference")


@dataclass(frozen=True)
class Side:
    """One of the two packages: its Python, and its own folder of preprocessed data."""

    python: Path
    folder: Path
    processes: int

    @property
    def environment(self) -> dict[str, str]:
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        return {
            "nnUNet_raw": str(self.folder.parent / "raw"),
            "nnUNet_preprocessed": str(self.folder),
            "nnUNet_results": str(self.folder / "results"),
            **threads,
        }

    def task(self, name: str) -> Measured:
        """Time one of `preprocessing_tasks.py`, without the start of Python."""
        done = measure([str(self.python), str(TASKS_FILE), name, str(self.folder.parent)], self.environment)
        return Measured(float(done.output.split()[-1]), done.peak_mb, "")

    def command(self, name: str, *arguments: object) -> Measured:
        return measure([str(self.python.parent / name), *map(str, arguments)], self.environment)

    def command_names(self) -> list[str]:
        return json.loads(measure([str(self.python), "-c", COMMAND_NAMES]).output.splitlines()[-1])

    def forget_preprocessed(self) -> None:
        for folder in (self.folder / DATASET).glob("nnUNetPlans_*"):
            shutil.rmtree(folder)
        shutil.rmtree(self.folder / DATASET / "gt_segmentations", ignore_errors=True)

    def preprocess(self) -> Measured:
        self.forget_preprocessed()
        return self.command("nnUNetv2_preprocess", "-d", 990, "-c", "3d_fullres", "-np", self.processes)

    def extract_fingerprint(self) -> Measured:
        return self.command("nnUNetv2_extract_fingerprint", "-d", 990, "-np", self.processes, "--clean")

    def help_of_all(self) -> Measured:
        """Return the slowest answer."""
        answers = [self.command(name, "-h") for name in self.command_names()]
        return max(answers, key=lambda answer: answer.seconds)


MEASUREMENTS: dict[str, tuple[str, Callable[[Side], Measured], float]] = {
    "image": ("image, cubic, 200x400x400 to 250x500x500", lambda side: side.task("image"), 5),
    "labels": ("label map, 10 labels, the same shapes", lambda side: side.task("labels"), 10),
    "preprocess": ("`nnUNetv2_preprocess`, ten CT-like volumes of 150x300x300", Side.preprocess, 4),
    "fingerprint": ("`nnUNetv2_extract_fingerprint`, the same volumes", Side.extract_fingerprint, 3),
    "help": ("`-h`, the slowest of all commands", Side.help_of_all, 1),
    "listing": ("listing a dataset of 3000 cases", lambda side: side.task("listing"), 1),
    "planning": ("planning with nnUNetPlannerResEncL", lambda side: side.task("planning"), 3),
}
"""Name -> (line of the table, function to run, how many times faster it should be)."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference",
        type=Path,
        default=PROJECT / ".venv-reference/bin/python",
        metavar="PYTHON",
        help="Python of an environment with the reference release (default: %(default)s)",
    )
    parser.add_argument(
        "--ours",
        type=Path,
        default=Path(sys.executable),
        metavar="PYTHON",
        help="Python of an environment with this package (default: the one that runs this)",
    )
    parser.add_argument("--processes", type=int, default=2, help="workers of both packages (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts (default: 3)")
    parser.add_argument("--scale", type=float, default=1.0, help="scale every side of the volumes")
    parser.add_argument(
        "--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS), help="measure these only"
    )
    parser.add_argument("--folder", type=Path, help="keep the volumes here and reuse them (default: a temporary one)")
    return parser


def prepare(folder: Path, sides: Sequence[Side], scale: float) -> None:
    """Write all volumes once, and plan with the reference for both sides."""
    raw = folder / "raw"
    write_resampling_volumes(folder, scale)
    write_many_names(folder / "many", 3000)
    write_ct_dataset(raw / DATASET, scale)
    ours, reference = sides
    for side in sides:
        side.folder.mkdir(parents=True, exist_ok=True)
    if not (reference.folder / DATASET / "nnUNetPlans.json").is_file():
        reference.extract_fingerprint()
        reference.command("nnUNetv2_plan_experiment", "-d", 990)
    for name in ("dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json"):
        target = ours.folder / DATASET / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(reference.folder / DATASET / name, target)


def measure_in_turn(run: Callable[[Side], Measured], sides: Sequence[Side], repeats: int) -> list[Measured]:
    """Return the medians of time and memory of each side."""
    runs = [[run(side) for side in sides] for _ in range(repeats)]
    return [
        Measured(
            statistics.median(run.seconds for run in of_side), statistics.median(run.peak_mb for run in of_side), ""
        )
        for of_side in zip(*runs)
    ]


def describe(title: str, wanted: float, ours: Measured, reference: Measured) -> str:
    faster, leaner = reference.seconds / ours.seconds, reference.peak_mb / ours.peak_mb
    return (
        f"| {title} | {ours.seconds:.3g} s | {reference.seconds:.3g} s | {faster:.1f}x | {wanted:g}x | "
        f"{ours.peak_mb:.0f} MB | {reference.peak_mb:.0f} MB | {leaner:.1f}x |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pythons = dict(zip(SIDES, (arguments.ours, arguments.reference)))
        # absolute, but a link stays a link: it tells Python which environment it is in
        sides = [
            Side(Path(os.path.abspath(python)), folder.resolve() / name, arguments.processes)  # noqa: PTH100
            for name, python in pythons.items()
        ]
        prepare(folder.resolve(), sides, arguments.scale)
        print(
            f"{arguments.processes} processes, medians of {arguments.repeats}, sides of volumes scaled by "
            f"{arguments.scale:g}, load before: {os.getloadavg()[0]:.2f}"
        )
        print(
            "| what | ours | reference | faster | wanted | peak memory, ours | reference | less |\n"
            "|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        for name in arguments.only:
            title, run, wanted = MEASUREMENTS[name]
            print(describe(title, wanted, *measure_in_turn(run, sides, arguments.repeats)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
