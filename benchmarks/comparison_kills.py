"""Kill nnUNetv2_fed_compare again and again, and check that it ends with the numbers of an undisturbed run.

    python -m benchmarks.comparison_kills --folder WORK [--kills 5] [--seed 0]

Phantoms of the demo, three sites, two arms, two seeds. The command is run once to its end, then in another folder,
where it is killed (SIGKILL) at random moments, spread over all its steps, and continued with `--c`. Its children are
left to themselves, as by the kernel's killer of processes. Fails unless result.json is the same in both but for times
and bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demo.__main__ import SITES
from demo.phantoms import write_dataset
from nnunetv2.federated.commands.simulate import find_command

CONFIGURATION = "3d_fullres"
NUM_TRAIN, NUM_TEST = 4, 4
LENGTH = ("--epochs", "3", "--iterations", "4", "--val_iterations", "1")
PATCH = {"batch_size": 2, "architecture": {"arch_kwargs": {"features_per_stage": [4, 8, 16, 16, 16]}}}
RESULT = "result.json"
STEPS = ("planned/*", "trained/*/*", "predicted/*/*/*")
LONGEST_DELAY_S = 20.0
_LONGEST_S = 3600.0


def write_sites(folder: Path) -> dict[str, str]:
    """Write the datasets of all sites, and return the environment of the command."""
    raw = folder / "raw"
    for seed, (name, (number, scanner)) in enumerate(SITES.items()):
        dataset = raw / f"Dataset{number}_{name.capitalize()}"
        if not dataset.exists():
            write_dataset(dataset, scanner, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed)
    (folder / "patch.json").write_text(json.dumps({"configurations": {CONFIGURATION: PATCH}}), encoding="utf-8")
    return {**os.environ, "nnUNet_raw": str(raw), "nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"}


def compare_command(folder: Path, study: Path) -> list[str]:
    """Return the command of the comparison without `--c`."""
    numbers = [number for number, _ in SITES.values()]
    return [
        *(find_command("nnUNetv2_fed_compare"), "-d", *numbers, "--arms", "alone", "ffe", "--seeds", "2", *LENGTH),
        *("-device", "cpu", "--plans_patch", str(folder / "patch.json"), "--folder", str(study)),
    ]


def count_steps(study: Path) -> int:
    """Return how many steps of a comparison are whole."""
    folders = [path for pattern in STEPS for path in study.glob(pattern)]
    return sum(path.is_dir() and ".unfinished" not in str(path.relative_to(study)) for path in folders)


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, is_due: Callable[[], bool]) -> bool:
    """Run a command, kill it as soon as that is due, and return whether it was killed.

    Raises:
        RuntimeError: It failed by itself, or does not end.
    """
    deadline = time.monotonic() + _LONGEST_S
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=output)
        while process.poll() is None:
            if is_due() or time.monotonic() > deadline:
                process.kill()
                process.wait()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"nnUNetv2_fed_compare has not ended in {_LONGEST_S:.0f} s, see {log}")
                return True
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"nnUNetv2_fed_compare ended with {process.returncode}, see {log}")
    return False


def after(study: Path, num_steps: int, delay_s: float) -> Callable[[], bool]:
    """Return a condition that holds some seconds after so many steps are whole, and the command runs."""
    since: list[float] = []

    def is_due() -> bool:
        if not since and count_steps(study) >= num_steps:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= delay_s

    return is_due


def without_costs(result: Path) -> dict[str, Any]:
    """Return all numbers of a comparison but times and bytes."""
    content = json.loads(result.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key != "costs"}


def find_last_step(log: Path) -> str:
    """Return the last line of a log that names a step."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "$ " in line or line.startswith("---")]
    return lines[-1][:110] if lines else "nothing yet"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the phantoms, and of both comparisons")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = write_sites(folder)
    whole, killed, log = folder / "whole", folder / "killed", folder / "killed.log"
    begun = time.monotonic()
    options = ["--c"] if whole.exists() else []
    run([*compare_command(folder, whole), *options], environment, folder / "whole.log", lambda: False)
    seconds, total = time.monotonic() - begun, count_steps(whole)
    print(f"undisturbed: {seconds:.0f} s, {total} steps", flush=True)

    rng = np.random.default_rng(arguments.seed)
    reached = sorted(rng.choice(total, arguments.kills, replace=False))
    command = compare_command(folder, killed)
    for number, num_steps in enumerate(reached, start=1):
        options = ["--c"] if (killed / "study.json").exists() else []
        delay_s = rng.uniform(0, LONGEST_DELAY_S)
        if not run([*command, *options], environment, log, after(killed, int(num_steps), delay_s)):
            raise RuntimeError(f"the command had ended before kill {number}: run it in a new --folder")
        print(f"kill {number}, {count_steps(killed)} steps whole: {find_last_step(log)}", flush=True)
    run([*command, "--c"], environment, log, lambda: False)
    first, second = without_costs(whole / RESULT), without_costs(killed / RESULT)
    different = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    left = [str(path) for path in killed.rglob("*.unfinished")]
    print(f"different: {', '.join(different) or 'nothing'}; unfinished folders: {', '.join(left) or 'none'}")
    return int(bool(different or left))


if __name__ == "__main__":
    raise SystemExit(main())
