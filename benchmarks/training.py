"""Measure training on the CPU against the reference release, interleaved in one run.

    python benchmarks/training.py                        # patch 64x64x64, batch 2, 32 to 320 features
    python benchmarks/training.py --patch 32 --repeats 3 # a few minutes less
    python benchmarks/training.py --only start augmentation

One process of each package, and one more of ours in float32, take turns: a training step each, then the end of an
epoch each. Times are medians, with the range in brackets. The start is timed for the whole command, from the shell to
the first training step. Augmentation is measured by `augmentation.py`, in processor time.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FEATURES = [32, 64, 128, 256, 320]
LIMITS = {
    "training step, bfloat16": 2.3,
    "training step, float32": 1.0,
    "start to first step, default trainer": 2.0,
    "start to first step, own trainer": 2.0,
}
PARTS = ("turns", "start", "augmentation")
LONGEST_BETWEEN_EPOCHS_S = 0.1

# Runs in either package: builds a trainer and answers one command per line.
WORKER = """
import contextlib, io, json, os, resource, sys, time
import numpy as np, torch
value = json.loads(sys.argv[1])
torch.set_num_threads(value["threads"])
answers = sys.stdout
sys.stdout = io.StringIO()
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
trainer = nnUNetTrainer(plans={**value["plans"], "continue_training": False}, configuration="3d_fullres", fold=0,
                        dataset_json=value["dataset_json"], device=torch.device("cpu"))
trainer.initialize()
patch, n = value["plans"]["configurations"]["3d_fullres"]["patch_size"], 2
rng = np.random.default_rng(0)
strides = [2 ** i for i in range(len(trainer._get_deep_supervision_scales()))]
labels = torch.from_numpy(rng.integers(0, 3, (n, 1, *patch)).astype(np.int16))
batch = {"data": torch.from_numpy(rng.normal(size=(n, 1, *patch)).astype(np.float32)), "keys": [],
         "target": [labels[:, :, ::s, ::s, ::s].contiguous() for s in strides]}
trainer.network.train()

clock = {"wall": time.perf_counter, "cpu": time.process_time}[value["clock"]]

def step():
    start = clock()
    trainer.train_step(batch)
    return clock() - start

def between():
    trainer._best_ema = None  # every epoch is the best so far: a checkpoint is due
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        validated = [trainer.validation_step(batch)]
        start = time.perf_counter()
        trainer.on_validation_epoch_end(validated)
    trainer.on_epoch_end()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    seconds = time.perf_counter() - start
    trainer.lr_scheduler.step(0)
    if hasattr(trainer, "_writer"):
        trainer._writer.wait()  # an epoch takes longer than its files
        trainer.logger.local_logger.wait_for_plot()
    return seconds

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20

for line in sys.stdin:
    answers.write(json.dumps({"step": step, "between": between, "memory": memory}[line.strip()]()) + chr(10))
    answers.flush()
"""
FIRST_STEP = """
import os
import signal
import time

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class FirstStepTrainer(nnUNetTrainer):
    def train_step(self, batch):
        with open(os.environ["FIRST_STEP_FILE"], "w") as file:
            file.write(repr(time.time()))
        os.killpg(0, signal.SIGKILL)  # the workers too: nobody else would end them
"""
# The command nnUNetv2_train, after two arguments of its own. Trainers of the reference import torchvision, whose wheel
# has no operators for a torch without CUDA; two declarations let it be imported.
COMMAND = """
import sys
stub, trainer = sys.argv.pop(1), sys.argv.pop(1)
if stub == "stub":
    import torch
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold, float scale, int zero_point) -> Tensor")
if trainer == "default":
    import os
    sys.path.insert(0, os.environ["nnUNet_extTrainer"])
    from first_step import FirstStepTrainer, nnUNetTrainer
    nnUNetTrainer.train_step = FirstStepTrainer.train_step
from nnunetv2.run.run_training import run_training_entry
run_training_entry()
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference",
        default=str(PROJECT / ".venv-reference" / "bin" / "python"),
        help="Python with the reference release",
    )
    parser.add_argument("--patch", type=int, default=64, help="edge of the cubic patch. Default: 64")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each process; the median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each step")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="what training steps are timed with; cpu, with --threads 1, on a machine that others use",
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="what to measure. Default: everything")
    return parser


def make_dataset(preprocessed: Path, patch: int) -> dict:
    """Write a tiny dataset with plans for a network of realistic size; return plans and dataset.json."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from tiny_dataset import NAME, make_tiny_dataset

    plans = make_tiny_dataset(preprocessed, stages=len(FEATURES))
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [patch] * 3
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = FEATURES
    (preprocessed / NAME / "nnUNetPlans.json").write_text(json.dumps(plans))
    return {"plans": plans, "dataset_json": json.loads((preprocessed / NAME / "dataset.json").read_text())}


def environment(folder: Path, who: str, *, autocast: bool = True) -> dict[str, str]:
    """Return the variables of a process; each has its own folder for results."""
    results = folder / f"results_{who}"
    results.mkdir(exist_ok=True)
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "nnUNet_raw": str(folder),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(results),
        "nnUNet_extTrainer": str(folder / "trainers"),
        "nnUNet_n_proc_DA": "2",
        "nnUNet_cpu_autocast": "1" if autocast else "0",
        "MPLBACKEND": "Agg",
    }


@contextmanager
def worker(python: str, variables: dict[str, str], value: dict, folder: Path) -> Iterator[subprocess.Popen]:
    """Run a process that answers commands, and end it afterwards."""
    process = subprocess.Popen(
        [python, "-c", WORKER, json.dumps(value)],
        env=variables,
        cwd=folder,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen, command: str) -> float:
    process.stdin.write(command + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process ended while it was asked for {command}")
    return json.loads(answer)


def time_start(python: str, variables: dict[str, str], folder: Path, trainer: str, *, is_reference: bool) -> float:
    """Return the seconds from starting the command to the first training step.

    Args:
        trainer: `default` for nnUNetTrainer; `own` for one of the user, found through nnUNet_extTrainer.
    """
    file = folder / "first_step"
    file.unlink(missing_ok=True)
    start = time.time()
    command = [python, "-c", COMMAND, "stub" if is_reference else "-", trainer, "998", "3d_fullres", "0"]
    name = [] if trainer == "default" else ["-tr", "FirstStepTrainer"]
    subprocess.run(
        [*command, *name, "-device", "cpu"],
        env={**variables, "FIRST_STEP_FILE": str(file)},
        cwd=folder,
        check=False,
        timeout=600,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return float(file.read_text()) - start  # the file is missing if the training did not come that far


def measure_starts(folder: Path, python: str, repeats: int) -> None:
    """Time the start with the default trainer, and with one that has to be searched for."""
    environments = {python: environment(folder, "reference"), sys.executable: environment(folder, "bfloat16")}
    for trainer in ("default", "own"):
        seconds = {name: [] for name in environments}
        for _ in range(repeats):
            for name, variables in environments.items():
                seconds[name].append(time_start(name, variables, folder, trainer, is_reference=name == python))
        summarize(f"start to first step, {trainer} trainer", *seconds.values())


def summarize(name: str, theirs: Sequence[float], ours: Sequence[float], unit: str = "s") -> None:
    """Print both medians and their ratio."""

    def show(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.3f} {unit} ({min(values):.3f} to {max(values):.3f})"

    ratio = statistics.median(theirs) / statistics.median(ours)
    wanted = f", wanted {LIMITS[name]:g}" if name in LIMITS else ""
    print(f"{name}: reference {show(theirs)}, ours {show(ours)}: {ratio:.2f}x{wanted}", flush=True)


def measure_turns(folder: Path, python: str, value: dict, repeats: int) -> None:
    """Let the processes take turns at training steps and at ends of epochs."""
    who = {"reference": (python, True), "bfloat16": (sys.executable, True), "float32": (sys.executable, False)}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(worker(interpreter, environment(folder, name, autocast=autocast), value, folder))
            for name, (interpreter, autocast) in who.items()
        }
        for process in processes.values():
            ask(process, "step")  # warm-up
        steps = {name: [] for name in processes}
        for _ in range(repeats):
            for name, process in processes.items():
                steps[name].append(ask(process, "step"))
        for name in ("bfloat16", "float32"):
            summarize(f"training step, {name}", steps["reference"], steps[name])
        pauses = {"reference": [], "bfloat16": []}
        for _ in range(repeats):
            for name, values in pauses.items():
                values.append(ask(processes[name], "between"))
        # The first end of an epoch imports the plotting library, and touches the memory of snapshots.
        pauses = {name: values[1:] or values for name, values in pauses.items()}
        summarize("between epochs", pauses["reference"], pauses["bfloat16"])
        print(f"  limit: {LONGEST_BETWEEN_EPOCHS_S} s", flush=True)
        for name in ("bfloat16", "float32"):
            summarize(
                f"peak memory, {name}", [ask(processes["reference"], "memory")], [ask(processes[name], "memory")], "GiB"
            )


def measure_augmentation(python: Path, rounds: int) -> None:
    """Compare the samples per second of one core, for each kind of patch."""
    sys.path.insert(0, str(PROJECT))
    from benchmarks.augmentation import TASKS, WANTED, measure

    for task in TASKS:
        result = measure(task, rounds, reference=python)
        print(
            f"augmentation, {task}: reference {result['reference']:.1f}, ours {result['ours']:.1f} samples/s: "
            f"{result['ratio']:.2f}x, wanted {WANTED[task]:g}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    print(
        f"load {os.getloadavg()}, {args.threads} threads, {args.clock} time, patch {args.patch}, "
        f"{args.repeats} repeats",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trainers").mkdir()
        (folder / "trainers" / "first_step.py").write_text(FIRST_STEP)
        value = {**make_dataset(folder / "preprocessed", args.patch), "threads": args.threads, "clock": args.clock}
        if "turns" in args.only:
            measure_turns(folder, args.reference, value, args.repeats)
        if "start" in args.only:
            measure_starts(folder, args.reference, args.repeats)
    if "augmentation" in args.only:
        measure_augmentation(Path(args.reference), args.repeats)
    print(f"load {os.getloadavg()}", flush=True)


if __name__ == "__main__":
    main()
