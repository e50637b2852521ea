"""What this package writes the reference release reads, and the reverse: postprocessing, zip files, overlays."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import SimpleITK as sitk
from trained_models import NAME, make_trained_models

from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.postprocessing.decision_files import load_functions
from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing_to_folder, determine_postprocessing
from nnunetv2.utilities.label_colours import generate_overlay
from nnunetv2.utilities.overlay_plots import select_slice_to_plot, select_slice_to_plot2

THEIR_SIDE = """
import os, pickle, shutil
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing_to_folder
from nnunetv2.utilities.overlay_plots import generate_overlay, select_slice_to_plot, select_slice_to_plot2
os.makedirs(value["ensembles"])
export_pretrained_model(value["dataset"], value["their_zip"], ("2d", "3d_fullres"), folds=(0, 1))
functions, kwargs = pickle.load(open(value["pickle"], "rb"))
apply_postprocessing_to_folder(value["predictions"], value["applied"], functions, kwargs, num_processes=1)
shutil.rmtree(value["results"])
os.makedirs(value["results"])
install_model_from_zip_file(value["our_zip"])
for number in range(int(value["pictures"])):
    image, labels = inputs[f"image_{number}"], inputs[f"labels_{number}"]
    outputs[f"picture_{number}"] = generate_overlay(image[1], labels[1])
    outputs[f"slices_{number}"] = np.array([select_slice_to_plot(image, labels), select_slice_to_plot2(image, labels)])
"""


def draw_slices(number):
    rng = np.random.default_rng(number)
    labels = rng.integers(0, 3 + 3 * number, (4, 12, 15)) * (rng.random((4, 12, 15)) < 0.5)
    return rng.normal(0, 100, (4, 12, 15)).astype(np.float32), labels.astype(np.int16)


def read_folder(folder):
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in folder.glob("*.nii.gz")}


def files_below(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_both_read_what_the_other_writes(roots, tmp_path, reference, monkeypatch):
    results = make_trained_models(roots, planned=["2d", "3d_fullres"])
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    for fold in (0, 1):
        for file in (results / f"nnUNetTrainer__nnUNetPlans__2d/fold_{fold}/validation").glob("*.nii.gz"):
            shutil.copy(file, predictions)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(results / "nnUNetTrainer__nnUNetPlans__2d" / name, predictions)
    functions, kwargs = determine_postprocessing(
        str(predictions), str(roots["nnUNet_preprocessed"] / NAME / "gt_segmentations"), None, None, 1
    )
    assert functions
    export_pretrained_model(NAME, str(tmp_path / "ours.zip"), ("2d", "3d_fullres"), folds=(0, 1))
    slices = [draw_slices(number) for number in range(4)]

    monkeypatch.setenv("nnUNet_results", str(roots["nnUNet_results"]))
    arrays = {
        f"{name}_{number}": array
        for number, pair in enumerate(slices)
        for name, array in zip(("image", "labels"), pair)
    }
    theirs, _ = reference.run(
        THEIR_SIDE,
        {
            "dataset": NAME,
            "ensembles": str(results / "ensembles"),
            "their_zip": str(tmp_path / "theirs.zip"),
            "our_zip": str(tmp_path / "ours.zip"),
            "pickle": str(predictions / "postprocessing.pkl"),
            "predictions": str(predictions),
            "applied": str(tmp_path / "applied_by_them"),
            "results": str(roots["nnUNet_results"]),
            "pictures": len(slices),
        },
        **arrays,
    )

    # our zip file, installed by them, and theirs, installed by us, hold the same model
    installed = files_below(roots["nnUNet_results"])
    with zipfile.ZipFile(tmp_path / "theirs.zip") as archive:
        assert set(archive.namelist()) == set(installed)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "installed_by_us"))
    install_model_from_zip_file(str(tmp_path / "theirs.zip"))
    assert files_below(tmp_path / "installed_by_us") == installed
    # our pickle, applied by them
    apply_postprocessing_to_folder(
        str(predictions),
        str(tmp_path / "applied_by_us"),
        *load_functions(predictions / "postprocessing.pkl"),
        num_processes=1,
    )
    ours, applied = read_folder(tmp_path / "applied_by_us"), read_folder(tmp_path / "applied_by_them")
    assert set(ours) == set(applied) and all(np.array_equal(ours[name], applied[name]) for name in ours)
    assert json.loads((predictions / "postprocessing.json").read_text())["postprocessing_kwargs"] == kwargs
    for number, (image, labels) in enumerate(slices):
        picture = generate_overlay(image[1], labels[1])
        assert np.abs(picture.astype(int) - theirs[f"picture_{number}"]).max() <= 1
        assert theirs[f"slices_{number}"].tolist() == [
            select_slice_to_plot(image, labels),
            select_slice_to_plot2(image, labels),
        ]
