"""Prediction with ONNX files needs a dozen packages, and torch is none of them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from bare_environment import PROJECT, download_wheels, list_packages, make_environment, megabytes, run
from tiny_models import TinyModel, write_model

from nnunetv2.inference.onnx import OnnxPredictor
from nnunetv2.model_sharing.onnx_export import export_to_onnx

REQUIREMENTS = PROJECT / "deploy" / "onnx-requirements.txt"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    download_wheels(REQUIREMENTS, folder)
    return folder


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    make_environment(folder, REQUIREMENTS, wheels, tmp_path_factory.mktemp("scratch"))
    return folder


@pytest.mark.slow
def test_a_dozen_packages_predict_volumes_and_photographs(wheels, installed, tmp_path):
    names = list_packages(installed)
    print(
        f"\n{len(names)} packages, this one included: {', '.join(sorted(names))}; {megabytes(wheels):.1f} MB to "
        f"download, {megabytes(installed / 'lib'):.1f} MB installed"
    )
    assert "nnunetv2" in names and not {"torch", "onnx"} & names
    if sys.version_info >= (3, 11):  # the last onnxruntime for 3.10 brings some of its own
        assert len(names) <= 12
    volume, photograph = tmp_path / "volume", tmp_path / "photograph"
    write_model(volume / "model", TinyModel(folds=(0, 1), lessons=30))
    write_model(
        photograph / "model",
        TinyModel(
            patch_size=(32, 24),
            spacing=(1.0, 1.0),
            channels=("R", "G", "B"),
            file_ending=".png",
            reader="NaturalImage2DIO",
            mirroring_axes=(0, 1),
            labels={"background": 0, "whole": [1, 2], "core": 2},
            regions_class_order=(1, 2),
            lessons=30,
        ),
    )
    rng = np.random.default_rng(0)
    for folder in (volume, photograph):
        (folder / "images").mkdir()
        export_to_onnx(folder / "model", folder / "onnx")
    sitk.WriteImage(
        sitk.GetImageFromArray(rng.normal(size=(20, 30, 25)).astype(np.float32)),
        str(volume / "images" / "case_0000.nii.gz"),
    )
    sitk.WriteImage(
        sitk.GetImageFromArray(rng.integers(0, 255, (40, 50, 3)).astype(np.uint8), isVector=True),
        str(photograph / "images" / "case_0000.png"),
    )
    for folder, ending in ((volume, ".nii.gz"), (photograph, ".png")):
        command = (installed / "bin" / "python", "-m", "nnunetv2.inference.onnx")
        run(*command, "-m", folder / "onnx", "-i", folder / "images", "-o", folder / "bare", cwd=tmp_path)
        OnnxPredictor(folder / "onnx").predict_from_files(folder / "images", folder / "full")
        maps = [sitk.GetArrayFromImage(sitk.ReadImage(str(folder / one / f"case{ending}"))) for one in ("bare", "full")]
        assert len(np.unique(maps[0])) > 1
        np.testing.assert_array_equal(*maps)
