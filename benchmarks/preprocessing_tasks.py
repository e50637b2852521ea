"""The steps that `preprocessing.py` times, by names that this package and the reference release share.

    PYTHON preprocessing_tasks.py TASK FOLDER

Runs in the environment of either; prints the seconds.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path

import numpy as np

IMAGE = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
LABELS = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}


def resample(array: np.ndarray, new_shape: np.ndarray, options: dict) -> None:
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    resample_data_or_seg_to_shape(array[None], new_shape, (1, 1, 1), (0.8, 0.8, 0.8), **options)


def prepare_resampling(name: str, options: dict, folder: Path):
    array, new_shape = np.load(folder / f"{name}.npy"), np.load(folder / "new_shape.npy").tolist()
    resample(array[:8, :8, :8], np.array((10, 10, 10)), options)  # imports and first calls
    return lambda: resample(array, new_shape, options)


def prepare_listing(folder: Path):
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    def list_cases() -> None:
        assert len(get_filenames_of_train_images_and_targets(str(folder / "many"))) == 3000

    return list_cases


def prepare_planning(_: Path):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    return lambda: plan_experiments([990], "nnUNetPlannerResEncL")


TASKS = {
    "image": lambda folder: prepare_resampling("image", IMAGE, folder),
    "labels": lambda folder: prepare_resampling("labels", LABELS, folder),
    "listing": prepare_listing,
    "planning": prepare_planning,
}

if __name__ == "__main__":
    run = TASKS[sys.argv[1]](Path(sys.argv[2]))
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    print(time.perf_counter() - start)
