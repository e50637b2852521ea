"""Modules that users put into the package folders are found by name and used, from raw data to preprocessed ones.

They go into a copy of the package, since the checkout is no place for a test to write to.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nnunetv2
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

PLUG_INS = {
    "experiment_planning/experiment_planners/my_planner.py": '''
import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.my_resampling import resample_by_repetition


class MyPlanner(ExperimentPlanner):
    """Isotropic data, another normalization and resampling, thinner networks."""

    def __init__(self, dataset_name_or_id, gpu_memory_target_in_gb=8, preprocessor_name="DefaultPreprocessor",
                 plans_name="myPlans", overwrite_target_spacing=None, suppress_transpose=False):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name,
                         overwrite_target_spacing, suppress_transpose)
        self.UNet_base_num_features = 16

    def determine_fullres_target_spacing(self):
        return np.array([1.5, 1.5, 1.5])

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self):
        return ["DivideByThousand"], [False]

    def determine_resampling(self, *args, **kwargs):
        return resample_by_repetition, {"is_seg": False}, resample_by_repetition, {"is_seg": True}
''',
    "preprocessing/preprocessors/my_preprocessor.py": """
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor


class MyPreprocessor(DefaultPreprocessor):
    def modify_seg_fn(self, seg, plans_manager, dataset_json, configuration_manager):
        seg[seg == 2] = 1
        return seg
""",
    "preprocessing/normalization/my_normalization.py": """
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization


class DivideByThousand(ImageNormalization):
    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = False

    def run(self, image, seg=None):
        return image.astype(self.target_dtype) / 1000
""",
    "preprocessing/resampling/my_resampling.py": """
import numpy as np


def resample_by_repetition(data, new_shape, current_spacing, new_spacing, is_seg=False):
    for axis, (old, new) in enumerate(zip(data.shape[1:], new_shape), start=1):
        data = np.take(data, np.arange(new) * old // new, axis=axis)
    return data
""",
    "imageio/my_reader.py": """
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO


class ReaderThatAddsAHundred(SimpleITKIO):
    def read_images(self, image_fnames):
        images, properties = super().read_images(image_fnames)
        return images + 100, properties

    def read_seg(self, seg_fname):
        return SimpleITKIO().read_images((seg_fname,))
""",
    "experiment_planning/dataset_fingerprint/my_extractor.py": """
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor


class QuickExtractor(DatasetFingerprintExtractor):
    def __init__(self, dataset_name_or_id, num_processes=8, verbose=False):
        super().__init__(dataset_name_or_id, num_processes, verbose)
        self.num_foreground_voxels_for_intensitystats = 1000

    def run(self, overwrite_existing=False):
        fingerprint = super().run(overwrite_existing)
        print("extracted quickly")
        return fingerprint
""",
    # Comes first in the alphabet, does not import, and must not stand in the way.
    "experiment_planning/a_broken_module.py": "import no_such_library\n",
}


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package with the plug-ins in it; returns the folder that it is imported from."""
    site = tmp_path / "site"
    shutil.copytree(
        Path(nnunetv2.__file__).parent, site / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__", ".partial-*")
    )
    for name, source in PLUG_INS.items():
        (site / "nnunetv2" / name).write_text(source)
    return site


def run_command(package: Path, *arguments: str) -> str:
    code = (
        "from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as e\n"
        "if __name__ == '__main__': e.plan_and_preprocess_entry()"
    )
    script = package / "command.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_plug_ins_of_users_are_found_and_used(package, make_scans, make_case, roots, processes):
    folder = make_scans(
        {f"case_{i}": make_case(i, shape=(8, 16, 20)) for i in range(2)},
        overwrite_image_reader_writer="ReaderThatAddsAHundred",
    )
    printed = run_command(
        package,
        "-d",
        "2",
        "-fpe",
        "QuickExtractor",
        "-pl",
        "MyPlanner",
        "-preprocessor_name",
        "MyPreprocessor",
        "-npfp",
        processes,
        "-np",
        processes,
        "-c",
        "3d_fullres",
        "--no_pbar",
    )
    assert "extracted quickly" in printed
    preprocessed = roots["nnUNet_preprocessed"] / folder.name
    plans = json.loads((preprocessed / "myPlans.json").read_text())
    fullres = plans["configurations"]["3d_fullres"]
    assert plans["experiment_planner_used"] == "MyPlanner"
    assert plans["image_reader_writer"] == "ReaderThatAddsAHundred"
    assert fullres["normalization_schemes"] == ["DivideByThousand"] and fullres["spacing"] == [1.5, 1.5, 1.5]
    assert fullres["resampling_fn_data"] == "resample_by_repetition"
    assert fullres["architecture"]["arch_kwargs"]["features_per_stage"][0] == 16

    data, label, _, _ = nnUNetDatasetBlosc2(str(preprocessed / "myPlans_3d_fullres")).load_case("case_0")
    assert data.shape == label.shape == (1, 16, 16, 13)  # (8, 16, 20) of (3, 1.5, 1) mm at 1.5 mm
    assert set(np.unique(label[:])) <= {-1, 0, 1}  # 2 became 1
    assert 0.15 < data[:].mean() < 0.25  # (100 + 100) / 1000
