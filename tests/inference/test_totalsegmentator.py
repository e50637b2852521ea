"""Run TotalSegmentator 2.18, as its registry package has it, on this package; its weights are stand-ins.

pip fetches the package and the few libraries it imports on this way, without their dependencies, into a folder of its
own. FEDNNUNET_TOTALSEGMENTATOR names a folder that already holds them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyModel, write_model

pytestmark = [pytest.mark.slow, pytest.mark.parity]

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("TotalSegmentator==2.18.0", "dicom2nifti", "pydicom", "xmltodict")
FOLDERS = {297: "Dataset297_TotalSegmentator_total_3mm_1559subj", 300: "Dataset300_body_6mm_1559subj"}

RUN = """
import json, sys
import nibabel as nib
import numpy as np

if __name__ == "__main__":
    from totalsegmentator.python_api import totalsegmentator
    from totalsegmentator.nnunet import nnUNetv2_predict
    from totalsegmentator.nnunet_runtime_patches import patch_nnunet_cropped_logits_resampling
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    image, out, is_reference = sys.argv[1:4]
    common = dict(device="cpu", ml=True, quiet=True, fast=True, nr_thr_saving=1)
    totalsegmentator(image, out + "/total.nii.gz", task="total", **common)
    totalsegmentator(image, out + "/cropped.nii.gz", task="total", higher_order_resampling=True, **common)
    if is_reference == "no":  # there its label map is that of the first call
        totalsegmentator(image, out + "/with_probabilities.nii.gz", task="total",
                         save_probabilities=__import__("pathlib").Path(out, "probabilities.npz"), **common)
    returned = totalsegmentator(nib.load(image), None, task="body", **common)
    nib.save(returned, out + "/body.nii.gz")
    json.dump({"patched": hasattr(nnUNetPredictor, "_totalseg_cropped_logits_resampling_patch"),
               "patched_now": patch_nnunet_cropped_logits_resampling()}, open(out + "/answer.json", "w"))
"""


@pytest.fixture(scope="session")
def totalsegmentator(tmp_path_factory) -> Path:
    """Return a folder with the package and what it imports, or skip."""
    given = os.environ.get("FEDNNUNET_TOTALSEGMENTATOR")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("totalsegmentator")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--target",
        str(folder),
        *PACKAGES,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot fetch TotalSegmentator: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Write the folder of weights: the model of the task "total", and that of the body."""
    folder = tmp_path_factory.mktemp("weights")
    labels = {"background": 0, **{f"class_{i}": i for i in range(1, 12)}}
    total = TinyModel(
        patch_size=(16, 16, 16),
        spacing=(4.5, 4.5, 4.5),
        channels=("CT",),
        mirroring_axes=None,
        labels=labels,
        reader="NibabelIOWithReorient",
        lessons=150,
    )
    # The trainer of this checkpoint is TotalSegmentator's own.
    body = replace(
        total,
        spacing=(6.0, 6.0, 6.0),
        labels={"background": 0, "trunk": 1, "extremities": 2},
        trainer="nnUNetTrainerDiceTopK10Loss_2000epochs",
    )
    for number, model in ((297, total), (300, body)):
        trainer = "nnUNetTrainer_4000epochs_NoMirroring" if number == 297 else "nnUNetTrainer"
        parent = folder / FOLDERS[number]
        parent.mkdir()
        write_model(parent / f"{trainer}__nnUNetPlans__3d_fullres", model)
    return folder


@pytest.fixture
def image(tmp_path) -> Path:
    import nibabel as nib
    from scipy.ndimage import gaussian_filter

    voxels = gaussian_filter(np.random.default_rng(0).normal(size=(50, 56, 62)), 3) * 6000
    affine = np.diag([-1.5, -1.5, 1.5, 1.0])
    affine[:3, 3] = 40, -20, 7
    nib.save(nib.Nifti1Image(voxels.astype(np.int16), affine), tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


def run(python: Path, packages: Path, weights: Path, image: Path, out: Path, is_reference: str = "no") -> Path:
    """Run TotalSegmentator in the environment of an interpreter; it must not tell anybody."""
    home = out / "home"
    home.mkdir(parents=True)
    (home / "config.json").write_text(
        json.dumps({"totalseg_id": "totalseg_TEST", "send_usage_stats": False, "prediction_counter": 0})
    )
    script = out / "run.py"
    script.write_text(RUN)
    environment = {
        **os.environ,
        "PYTHONPATH": str(packages),
        "TOTALSEG_HOME_DIR": str(home),
        "OMP_NUM_THREADS": "1",
        "TOTALSEG_WEIGHTS_PATH": str(weights),
        "nnUNet_cpu_autocast": "0",
    }
    arguments = [str(part) for part in (python, script, image, out, is_reference)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


def read(path: Path) -> np.ndarray:
    import nibabel as nib

    return np.asanyarray(nib.load(path).dataobj)


def test_totalsegmentator_runs_unpatched_and_gives_the_results_of_the_reference(
    totalsegmentator, weights, image, tmp_path
):
    mine = run(Path(sys.executable), totalsegmentator, weights, image, tmp_path / "mine")
    assert json.loads((mine / "answer.json").read_text()) == {"patched": False, "patched_now": False}
    assert read(mine / "total.nii.gz").shape == read(image).shape
    assert len(np.unique(read(mine / "total.nii.gz"))) > 5
    assert np.load(mine / "probabilities.npz")["probabilities"].shape[0] == 12

    reference = Path(os.environ.get("FEDNNUNET_REFERENCE", PROJECT / ".venv-reference"), "bin", "python")
    if not reference.exists():
        pytest.skip("no reference environment to compare with; create it with `make reference`")
    theirs = run(reference, totalsegmentator, weights, image, tmp_path / "theirs", is_reference="yes")
    agreement = {
        name: np.mean(read(mine / f"{name}.nii.gz") == read(theirs / f"{name}.nii.gz"))
        for name in ("total", "cropped", "body")
    }
    assert np.array_equal(read(mine / "with_probabilities.nii.gz"), read(mine / "total.nii.gz"))
    print(agreement)
    # A dozen classes that a few lessons have taught are nearly equal in many voxels.
    assert min(agreement.values()) >= 0.99
