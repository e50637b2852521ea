"""Fixtures of the tests of inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TinyModel, write_model


@pytest.fixture(autouse=True)
def _single_precision(monkeypatch):
    """Keep bfloat16 out of comparisons, whatever the CPU can."""
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")


@pytest.fixture
def make_predictor(tmp_path):
    """Return a function that writes a tiny model and loads it."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    def make(use_folds=(0,), predictor_class=nnUNetPredictor, options=None, **changes):
        folder = tmp_path / "model"
        if not folder.exists():
            write_model(folder, TinyModel(**changes))
        predictor = predictor_class(**{"device": torch.device("cpu"), "allow_tqdm": False, **(options or {})})
        predictor.initialize_from_trained_model_folder(folder, use_folds)
        return predictor

    return make


@pytest.fixture
def write_images(tmp_path):
    """Return a function that writes NIfTI cases with all sides, spacings and offsets unequal."""

    def write(names=("liver_1", "liver_2"), shape=(14, 18, 22), channels=1, folder="images") -> Path:
        import SimpleITK as sitk

        target = tmp_path / folder
        target.mkdir(exist_ok=True)
        for seed, name in enumerate(names):
            voxels = np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32)
            voxels[:, :2] = 0  # preprocessing crops this
            for channel in range(channels):
                image = sitk.GetImageFromArray(voxels[channel])
                image.SetSpacing((0.75, 1.25, 2.5))
                image.SetOrigin((-11.0, 7.0, 103.0 + seed))
                image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
                sitk.WriteImage(image, str(target / f"{name}_{channel:04d}.nii.gz"))
        return target

    return write
