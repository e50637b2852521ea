"""What a dataset.json can say, from raw data through plans to preprocessed data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planning_scans import write_nifti

from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as entrypoints
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


@pytest.fixture
def plan_and_preprocess(roots, monkeypatch):
    """Run the command on a raw dataset and return its plans and a way to load what came out."""
    construct = DatasetFingerprintExtractor.__init__

    def with_few_voxels(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 3000

    monkeypatch.setattr(DatasetFingerprintExtractor, "__init__", with_few_voxels)

    def run(folder, *flags):
        entrypoints.plan_and_preprocess_main(
            ["-d", folder.name, "-npfp", "1", "-np", "1", "--no_pbar", "--verify_dataset_integrity", *flags]
        )
        preprocessed = roots["nnUNet_preprocessed"] / folder.name
        plans = PlansManager(str(preprocessed / "nnUNetPlans.json"))

        def load(configuration, case):
            data_folder = preprocessed / plans.get_configuration(configuration).data_identifier
            data, label, _, properties = nnUNetDatasetBlosc2(str(data_folder)).load_case(case)
            return data[:], label[:], properties

        return plans, load

    return run


def test_regions_with_an_ignore_label_and_two_channels(make_scans, make_case, plan_and_preprocess, roots):
    images, label, spacing = make_case(0, shape=(8, 20, 24), num_channels=2)
    label[0, 0, :5] = 3
    folder = make_scans(
        {"a": (images, label, spacing), "b": (images, label, spacing)},
        channels=["CT", "noNorm"],
        labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        regions_class_order=[1, 2],
    )
    plans, load = plan_and_preprocess(folder)
    fullres = plans.get_configuration("3d_fullres")
    assert fullres.normalization_schemes == ["CTNormalization", "NoNormalization"]
    data, preprocessed_label, properties = load("3d_fullres", "a")
    assert data.shape == (2, 8, 20, 24)
    np.testing.assert_array_equal(data[1], images[1])
    np.testing.assert_array_equal(preprocessed_label[0], label)
    locations = properties["class_locations"]
    assert list(locations) == [(1, 2), 2, (-1, 0, 1, 2)]
    assert len(locations[(1, 2)]) == np.isin(label, (1, 2)).sum()


def test_files_listed_in_the_description(make_case, plan_and_preprocess, roots, tmp_path, monkeypatch):
    """Images of another dataset by a relative path, of another disk by a variable; labels of their own."""
    folder = roots["nnUNet_raw"] / "Dataset003_Listed"
    others = roots["nnUNet_raw"] / "Dataset002_Others" / "imagesTr", tmp_path / "disk"
    for place in (folder, *others):
        place.mkdir(parents=True)
    monkeypatch.setenv("MY_DISK", str(others[1]))
    for i, place in enumerate(others):
        (image,), label, spacing = make_case(i, shape=(8, 20, 24))
        write_nifti(image, place / f"scan {i}.nii.gz", spacing)
        write_nifti(label, folder / f"label_{i}.nii.gz", spacing)
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MR"},
                "labels": {"background": 0, "organ": 1, "tumour": 2},
                "numTraining": 2,
                "file_ending": ".nii.gz",
                "dataset": {
                    "first": {"images": ["../Dataset002_Others/imagesTr/scan 0.nii.gz"], "label": "label_0.nii.gz"},
                    "second": {"images": ["$MY_DISK/scan 1.nii.gz"], "label": "label_1.nii.gz"},
                },
            }
        )
    )
    _, load = plan_and_preprocess(folder, "-c", "2d")
    assert load("2d", "first")[0].shape == load("2d", "second")[0].shape == (1, 8, 20, 24)
    copies = roots["nnUNet_preprocessed"] / folder.name / "gt_segmentations"
    assert sorted(file.name for file in copies.iterdir()) == ["first.nii.gz", "second.nii.gz"]


@pytest.mark.slow
def test_photographs_are_2d_only(plan_and_preprocess, roots):
    from skimage import io

    folder = roots["nnUNet_raw"] / "Dataset004_Photos"
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(2):
        label = np.zeros((40, 56), np.uint8)
        label[10:20, 12:30] = 1
        io.imsave(folder / "imagesTr" / f"p{i}_0000.png", rng.integers(1, 255, (40, 56, 3)).astype(np.uint8))
        io.imsave(folder / "labelsTr" / f"p{i}.png", label, check_contrast=False)
    channels = {str(i): "rgb_to_0_1" for i in range(3)}
    (folder / "dataset.json").write_text(
        json.dumps(
            {"channel_names": channels, "labels": {"background": 0, "road": 1}, "numTraining": 2, "file_ending": ".png"}
        )
    )
    plans, load = plan_and_preprocess(folder)
    assert plans.available_configurations == ["2d"]
    assert plans.image_reader_writer_class.__name__ == "NaturalImage2DIO"
    data, label, _ = load("2d", "p0")
    assert data.shape == (3, 1, 40, 56) and 0 <= data.min() < data.max() <= 1 and label.max() == 1


def test_thick_slices_come_first_and_a_reader_is_named(make_scans, make_case, plan_and_preprocess, roots):
    """Slices along the last array axis of a sagittal scan; the description picks the reader."""
    folder = make_scans(
        {"a": make_case(0, shape=(24, 20, 8), spacing=(1.0, 1.2, 4.0))}, overwrite_image_reader_writer="NibabelIO"
    )
    plans, load = plan_and_preprocess(folder)
    assert plans.image_reader_writer_class.__name__ == "NibabelIO"
    assert plans.transpose_forward == [2, 0, 1] and plans.transpose_backward == [1, 2, 0]
    assert plans.get_configuration("2d").spacing == pytest.approx([1.0, 1.2])
    data, _, properties = load("3d_fullres", "a")
    assert data.shape == (1, 8, 24, 20)
    assert properties["spacing"] == pytest.approx([1.0, 1.2, 4.0])
