"""Plan, preprocess and train on many tiny phantoms, three of them broken, and check that the sound ones are used.

    python benchmarks/bad_cases.py --cases 1000

Runs the installed commands in a folder of its own: one image is cut off, one label has another shape, one label is
missing. Prints the time of each step, and fails unless exactly the sound cases are used from the fingerprint to the
splits. 1,000 cases take about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

DATASET = "Dataset997_Broken"
SHAPE = (8, 20, 24)
TRAINER = "nnUNetTrainer_few_steps"
TRAINER_MODULE = f"""from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class {TRAINER}(nnUNetTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 4, 2
"""


def write_phantoms(raw: Path, num_cases: int) -> list[str]:
    """Write a dataset with three broken cases, and return the names of these."""
    import SimpleITK as sitk

    folder = raw / DATASET
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"phantom_{number:04d}" for number in range(num_cases)]
    for name in names:
        label = np.zeros(SHAPE, np.uint8)
        z, y, x = (int(rng.integers(1, length // 2)) for length in SHAPE)
        label[z : z + 3, y : y + 8, x : x + 8] = 1
        image = (label + rng.normal(0, 0.2, SHAPE)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "imagesTr" / f"{name}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "labelsTr" / f"{name}.nii.gz"))
    broken = [names[num_cases // 5], names[num_cases // 2], names[-1]]
    image = folder / "imagesTr" / f"{broken[0]}_0000.nii.gz"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    other = sitk.GetImageFromArray(np.zeros((SHAPE[0] + 1, *SHAPE[1:]), np.uint8))
    sitk.WriteImage(other, str(folder / "labelsTr" / f"{broken[1]}.nii.gz"))
    (folder / "labelsTr" / f"{broken[2]}.nii.gz").unlink()
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "blob": 1},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return broken


def run(folder: Path, num_cases: int, report: Callable[[str], None] = print) -> None:
    """Run all steps below a folder and check the cases that they used.

    Raises:
        SystemExit: A command failed, or used other cases than the sound ones.
    """
    roots = {name: folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    (folder / "trainers").mkdir(parents=True)
    (folder / "trainers" / f"{TRAINER}.py").write_text(TRAINER_MODULE)
    broken = write_phantoms(roots["nnUNet_raw"], num_cases)
    environment = {
        **os.environ,
        **{name: str(root) for name, root in roots.items()},
        "nnUNet_extTrainer": str(folder / "trainers"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_compile": "f",
    }
    preprocessed = roots["nnUNet_preprocessed"] / DATASET
    plan = ("nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", "3d_fullres", "-np", "2", "-npfp", "2", "--no_pbar")
    refused = _command(environment, *plan, report=report, may_fail=True)
    _require(refused.returncode == 1, "without the option, the broken cases fail the run")
    _command(environment, *plan, "--without_bad_cases", report=report)
    _command(environment, "nnUNetv2_train", DATASET, "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu", report=report)

    listed = {entry["case"]: entry["reason"] for entry in json.loads((preprocessed / "bad_cases.json").read_text())}
    for case, reason in listed.items():
        report(f"left out: {case}: {reason}")
    sound = num_cases - len(broken)
    fingerprint = json.loads((preprocessed / "dataset_fingerprint.json").read_text())
    first = json.loads((preprocessed / "splits_final.json").read_text())[0]
    used = {
        "list of bad cases": set(listed) == set(broken),
        "fingerprint": len(fingerprint["spacings"]) == sound,
        "preprocessed cases": len(list((preprocessed / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == sound,
        "references": len(list((preprocessed / "gt_segmentations").iterdir())) == sound,
        "splits": len({*first["train"], *first["val"]}) == sound and not {*first["train"], *first["val"]} & set(broken),
        "checkpoint": any(roots["nnUNet_results"].rglob("checkpoint_final.pth")),
        "validation": len(list(roots["nnUNet_results"].rglob("validation/*.nii.gz"))) == len(first["val"]),
    }
    for what, is_right in used.items():
        report(f"{what}: {'as expected' if is_right else 'WRONG'}")
    _require(all(used.values()), "all of them use the sound cases alone")
    report(f"{sound} of {num_cases} cases were used")


def _command(
    environment: dict[str, str], *words: str, report: Callable[[str], None], may_fail: bool = False
) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name(words[0])
    begin = time.perf_counter()
    done = subprocess.run(
        [str(program), *words[1:]],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    report(f"{' '.join(words)}: {time.perf_counter() - begin:.1f} s, status {done.returncode}")
    if done.returncode and not may_fail:
        raise SystemExit(done.stdout[-5000:])
    return done


def _require(condition: bool, expectation: str) -> None:
    if not condition:
        raise SystemExit(f"not met: {expectation}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="phantoms to make; 20 or more (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where they go; must not exist (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        run(arguments.folder, arguments.cases)
    else:
        with tempfile.TemporaryDirectory(prefix="bad_cases_") as temporary:
            run(Path(temporary) / "run", arguments.cases)
