"""Datasets made for planning: a fingerprint and a dataset.json without images, or a few small scans."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from planning_scans import write_nifti


@pytest.fixture
def make_planned_dataset(roots, monkeypatch) -> Callable[..., str]:
    """Write dataset.json and a fingerprint; the planner then works without any image."""

    def make(
        *,
        spacings: Sequence,
        shapes: Sequence,
        num_training: int,
        channels: Sequence[str] = ("CT",),
        labels: dict | None = None,
        relative_size: float = 1.0,
        number: int = 1,
        **more: object,
    ) -> str:
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

        name = f"Dataset{number:03d}_Made"
        raw, preprocessed = roots["nnUNet_raw"] / name, roots["nnUNet_preprocessed"] / name
        raw.mkdir()
        preprocessed.mkdir()
        dataset_json = {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": labels or {"background": 0, "organ": 1, "tumour": 2},
            "numTraining": num_training,
            "file_ending": ".nii.gz",
            "dataset": {"case": {"images": ["absent.nii.gz"], "label": "absent.nii.gz"}},
            **more,
        }
        fingerprint = {
            "spacings": spacings,
            "shapes_after_crop": shapes,
            "median_relative_size_after_cropping": relative_size,
            "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
        }
        (raw / "dataset.json").write_text(json.dumps(dataset_json))
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        monkeypatch.setattr(ExperimentPlanner, "determine_reader_writer", lambda self: Reader)
        return name

    return make


class Reader:
    """Stands for the class that would read the images."""


@pytest.fixture
def make_scans(roots) -> Callable[..., Path]:
    """Write a dataset of NIfTI files. Each case is (images per channel, label, spacing), arrays (z, y, x)."""

    def make(
        cases: dict[str, tuple[Sequence[np.ndarray], np.ndarray, Sequence[float]]],
        *,
        number: int = 2,
        labels: dict | None = None,
        channels: Sequence[str] | None = None,
        **more: object,
    ) -> Path:
        folder = roots["nnUNet_raw"] / f"Dataset{number:03d}_Scans"
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True)
        for case, (images, label, spacing) in cases.items():
            for i, image in enumerate(images):
                write_nifti(image, folder / "imagesTr" / f"{case}_{i:04d}.nii.gz", spacing)
            write_nifti(label, folder / "labelsTr" / f"{case}.nii.gz", spacing)
        num_channels = len(next(iter(cases.values()))[0])
        dataset_json = {
            "channel_names": dict(zip("0123456789", channels or ["MR"] * num_channels)),
            "labels": labels or {"background": 0, "organ": 1, "tumour": 2},
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
            **more,
        }
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
        return folder

    return make


@pytest.fixture
def make_case() -> Callable[..., tuple]:
    """Make one case for `make_scans`: all sides unequal, so that swapped axes show."""

    def make(
        seed: int = 0,
        *,
        shape: Sequence[int] = (6, 8, 10),
        spacing: Sequence[float] = (3.0, 1.5, 1.0),
        num_channels: int = 1,
        foreground: bool = True,
    ) -> tuple:
        generator = np.random.default_rng(seed)
        images = [generator.normal(100, 20, shape).astype(np.float32) for _ in range(num_channels)]
        label = np.zeros(shape, dtype=np.uint8)
        if foreground:
            label[1:4, 2:6, 3:8], label[2, 3:5, 4:6] = 1, 2
        return images, label, spacing

    return make
