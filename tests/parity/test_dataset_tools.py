"""Conversions, moved plans and generated descriptions beside the reference's: the same files, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

DESCRIPTION = {
    "name": "X",
    "description": "made",
    "licence": "none",
    "tensorImageSize": "4D",
    "release": "1.0",
    "modality": {"0": "T1", "1": "T2"},
    "labels": {"0": "background", "1": "a", "2": "b"},
    "numTraining": 2,
    "numTest": 1,
    "training": [],
    "test": ["./imagesTs/t1.nii.gz"],
}
PLANS = {
    "dataset_name": "Dataset009_Source",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "NibabelIO",
    "transpose_forward": [0, 1, 2],
    "foreground_intensity_properties_per_channel": {"0": {"mean": 3.0}},
    "configurations": {
        "2d": {"data_identifier": "nnUNetPlans_2d", "normalization_schemes": ["CTNormalization"]},
        "3d_fullres": {"data_identifier": "other", "normalization_schemes": ["CTNormalization"]},
        "mine": {"inherits_from": "2d"},
    },
}
GENERATE = """
from pathlib import Path
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
for name, keywords in value.items():
    Path(name).mkdir()
    keywords["channel_names"] = {int(key): entry for key, entry in keywords["channel_names"].items()}
    generate_dataset_json(name, **keywords, license="none", converted_by="us")
"""


@pytest.fixture
def both(roots, ours, reference, monkeypatch, tmp_path):
    """Run a command of both packages, each with roots of its own, and return these."""

    def run(prepare, *commands):
        results = []
        for name, side in (("ours", ours), ("theirs", reference)):
            folders = {root: tmp_path / name / root for root in roots}
            for root, folder in folders.items():
                folder.mkdir(parents=True)
                monkeypatch.setenv(root, str(folder))
            prepare(folders)
            for command in commands:
                side.command(*command)
            results.append(folders)
        return results

    return run


def read_all(folder: Path) -> dict[str, object]:
    """Return the content of all files: text of JSON, voxels and geometry of images."""
    return {str(file.relative_to(folder)): read(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def read(file: Path) -> object:
    if file.suffix == ".json":
        return file.read_text()
    image = sitk.ReadImage(str(file))
    return (
        sitk.GetArrayFromImage(image).tolist(),
        image.GetPixelID(),
        image.GetSpacing(),
        image.GetOrigin(),
        image.GetDirection(),
    )


@pytest.fixture
def task(tmp_path) -> Path:
    folder = tmp_path / "Task05_Organ"
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True)
    for case in ("c1", "c2"):
        image = sitk.JoinSeries([sitk.GetImageFromArray(rng.integers(-9, 9, (3, 4, 5)).astype(np.int16))] * 2)
        image.SetSpacing((1.5, 2.0, 3.0, 7.0))
        image.SetOrigin((-4.0, 5.0, 6.0, 0.0))
        image.SetDirection(np.diag([-1.0, -1, 1, 1]).ravel())
        sitk.WriteImage(image, str(folder / "imagesTr" / f"{case}.nii.gz"))
        label = sitk.GetImageFromArray(rng.integers(0, 3, (3, 4, 5)).astype(np.uint8))
        sitk.WriteImage(label, str(folder / "labelsTr" / f"{case}.nii.gz"))
    sitk.WriteImage(label, str(folder / "imagesTs" / "t1.nii.gz"))
    sitk.WriteImage(label, str(folder / "labelsTs" / "t1.nii.gz"))
    (folder / "dataset.json").write_text(json.dumps(DESCRIPTION))
    return folder


def test_conversions(both, task):
    ours, theirs = both(
        lambda folders: None,
        ("nnUNetv2_convert_MSD_dataset", "-i", task, "-np", 1),
        ("nnUNetv2_convert_MSD_dataset", "-i", task, "-np", 1, "-overwrite_id", 77),
        ("nnUNetv2_convert_old_nnUNet_dataset", task, "Dataset012_Organ"),
    )
    written, expected = (read_all(folders["nnUNet_raw"]) for folders in (ours, theirs))
    assert list(written) == list(expected)
    assert [name for name in written if written[name] != expected[name]] == []


def test_moved_plans(both):
    def prepare(folders):
        raw = folders["nnUNet_raw"] / "Dataset002_Target"
        (raw / "imagesTr").mkdir(parents=True)
        sitk.WriteImage(
            sitk.GetImageFromArray(np.zeros((3, 4, 5), np.float32)), str(raw / "imagesTr" / "a_0000.nii.gz")
        )
        (raw / "dataset.json").write_text(
            json.dumps(
                {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "numTraining": 1, "file_ending": ".nii.gz"}
            )
        )
        for name in ("Dataset009_Source", "Dataset002_Target"):
            (folders["nnUNet_preprocessed"] / name).mkdir()
        (folders["nnUNet_preprocessed"] / "Dataset009_Source" / "nnUNetPlans.json").write_text(json.dumps(PLANS))

    move = ("nnUNetv2_move_plans_between_datasets", "-s", 9, "-t", "Dataset002_Target", "-sp", "nnUNetPlans")
    ours, theirs = both(prepare, move, (*move, "-tp", "mine"))
    for name in ("nnUNetPlans.json", "mine.json"):
        written, expected = (
            read(folders["nnUNet_preprocessed"] / "Dataset002_Target" / name) for folders in (ours, theirs)
        )
        assert written == expected, name


def test_generated_descriptions(ours, reference, tmp_path):
    basic = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1},
        "num_training_cases": 5,
        "file_ending": ".nii.gz",
    }
    cases = {
        "plain": basic,
        "regions": {
            **basic,
            "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
            "regions_class_order": [1, 2],
        },
        "all": {
            **basic,
            "dataset_name": "X",
            "reference": "r",
            "release": "1",
            "description": "d",
            "overwrite_image_reader_writer": "NibabelIO",
            "extra": {"b": 1, "a": 2},
        },
    }
    texts = []
    for side in (ours, reference):
        side.run(GENERATE, {str(tmp_path / f"{id(side)}_{name}"): content for name, content in cases.items()})
        texts.append({name: (tmp_path / f"{id(side)}_{name}" / "dataset.json").read_text() for name in cases})
    # The reference writes the release where the citation belongs; without a release there is nothing to compare.
    written, expected = (
        {
            name: {key: entry for key, entry in json.loads(text).items() if key != "citation"}
            for name, text in of_side.items()
        }
        for of_side in texts
    )
    assert written == expected
    assert [list(content) for content in written.values()] == [list(content) for content in expected.values()]
