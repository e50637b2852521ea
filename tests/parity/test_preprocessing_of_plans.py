"""From scans to preprocessed cases in both packages: fingerprint, plans of two planners, every configuration.

A small memory target makes the planners plan a 3d_lowres for images as small as these.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

PLANNERS = {
    "ExperimentPlanner": "default_experiment_planner",
    "nnUNetPlannerResEncL": "residual_unets.residual_encoder_unet_planners",
}
MEMORY_TARGET_GB = 0.05
# The hippocampus is so small that only a finer grid makes a 3d_lowres worth it.
FINER_GRID = {"overwrite_target_spacing": [0.6, 0.5, 0.5]}

# Runs in either package. For each (dataset, planner, its module, keywords) in `value["tasks"]`, fills `outputs` with
# the arrays of all cases and configurations, and `answer` with what the plans say.
PREPROCESS_ALL = """
import contextlib, importlib, io, warnings
os.environ["nnUNet_preprocessed"] = value["preprocessed"]
os.environ["nnUNet_n_proc_DA"] = "1"
import torch
warnings.simplefilter("ignore")
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
answer = {}
for name, planner, module, keywords in value["tasks"]:
    planners = importlib.import_module("nnunetv2.experiment_planning.experiment_planners." + module)
    folder = os.path.join(os.environ["nnUNet_raw"], name)
    with contextlib.redirect_stdout(io.StringIO()):
        extractor = DatasetFingerprintExtractor(name, 1)
        extractor.show_progress_bar = False
        extractor.num_foreground_voxels_for_intensitystats = 1e6
        extractor.run()
        with torch.device("meta"):  # where the reference's networks cost nothing
            plans = getattr(planners, planner)(name, **keywords).plan_experiment()
    manager = PlansManager(json.loads(json.dumps(plans)))
    answer[f"{name} {planner}"] = manager.plans
    dataset_json = json.loads(open(os.path.join(folder, "dataset.json")).read())
    for configuration in manager.available_configurations:
        if "cascade" in configuration:
            continue
        for case, files in get_filenames_of_train_images_and_targets(folder).items():
            data, seg, properties = DefaultPreprocessor(verbose=False).run_case(
                files["images"], files["label"], manager, manager.get_configuration(configuration), dataset_json)
            key = f"{name} {planner} {configuration} {case}"
            outputs[key], outputs[key + " seg"] = data, seg
            for label, found in properties["class_locations"].items():
                outputs[f"{key} locations of {label}"] = np.asarray(found)
"""


@pytest.fixture
def write_dataset(roots):
    """Fill a raw folder with cases, {name: (images, label)}, by links."""

    def write(name, cases, labels, ending, channel="MRI", link=lambda source, target: target.symlink_to(source)):
        folder = roots["nnUNet_raw"] / name
        for sub in ("imagesTr", "labelsTr"):
            (folder / sub).mkdir(parents=True)
        for case, (image, label) in cases.items():
            link(image, folder / "imagesTr" / f"{case}_0000{ending}")
            link(label, folder / "labelsTr" / f"{case}{ending}")
        channels = ("R", "G", "B") if ending == ".png" else (channel,)
        (folder / "dataset.json").write_text(
            json.dumps(
                {
                    "channel_names": {str(i): name for i, name in enumerate(channels)},
                    "labels": labels,
                    "numTraining": len(cases),
                    "file_ending": ending,
                }
            )
        )
        return name

    return write


def test_preprocessed_cases_are_the_same_for_both_planners(roots, write_dataset, shared_data, reference, ours):
    datasets = [
        write_hippocampus(write_dataset, shared_data / "hippocampus"),
        write_spinal_cords(write_dataset, shared_data / "spinalcord"),
        write_fundus_photographs(write_dataset, shared_data / "retina" / "chasedb1"),
        write_odd_ct(write_dataset, shared_data / "odd"),
        write_odd_nrrd(write_dataset, shared_data / "odd"),
    ]
    tasks = [
        (
            name,
            planner,
            module,
            {"gpu_memory_target_in_gb": MEMORY_TARGET_GB, **(FINER_GRID if name == datasets[0] else {})},
        )
        for name in datasets
        for planner, module in PLANNERS.items()
    ]
    results = []
    for side in (ours, reference):
        preprocessed = side.folder / "preprocessed"
        for name in datasets:
            (preprocessed / name).mkdir(parents=True)
            shutil.copy2(roots["nnUNet_raw"] / name / "dataset.json", preprocessed / name)
        results.append(side.run(PREPROCESS_ALL, {"preprocessed": str(preprocessed), "tasks": tasks}))
    (arrays, plans), (expected, expected_plans) = results
    assert_plans_agree(plans, expected_plans)
    assert arrays.keys() == expected.keys()
    configurations = {key.split()[2] for key in arrays}
    assert configurations == {"2d", "3d_fullres", "3d_lowres"}
    for name in datasets[:2]:
        assert all(any(key.startswith(f"{name} {planner} 3d_lowres") for key in arrays) for planner in PLANNERS)
    for key in arrays:
        if "locations" in key:
            continue
        assert (arrays[key].shape, arrays[key].dtype) == (expected[key].shape, expected[key].dtype), key
        if key.endswith(" seg"):
            assert np.mean(arrays[key] == expected[key]) >= 0.9999, key
        else:
            np.testing.assert_allclose(arrays[key], expected[key], atol=1e-4, rtol=0, err_msg=key)
    assert_locations_agree(arrays, expected)


def assert_plans_agree(plans: dict, expected: dict) -> None:
    """Compare everything but mean and std of the intensities, which we sum in float64 and the reference in float32."""
    for name in expected:
        ours, theirs = ({**side[name]} for side in (plans, expected))
        statistics = [side.pop("foreground_intensity_properties_per_channel") for side in (ours, theirs)]
        assert ours == theirs
        for channel, values in statistics[1].items():
            assert statistics[0][channel] == pytest.approx(values, rel=1e-5)


def assert_locations_agree(arrays: dict, expected: dict) -> None:
    """Where all labels are the same, the same voxels are drawn."""
    compared = 0
    for key in (key for key in arrays if "locations" in key):
        seg = key.split(" locations")[0] + " seg"
        if np.array_equal(arrays[seg], expected[seg]):
            np.testing.assert_array_equal(arrays[key], expected[key])
            compared += 1
    assert compared > 0


# ------------------------------------------------------------------------------------------------ datasets


def write_hippocampus(write, folder: Path) -> str:
    names = sorted(path.name for path in (folder / "labels").glob("*.nii.gz"))[::100]
    return write(
        "Dataset981_Hippocampus",
        {name.removesuffix(".nii.gz"): (folder / "images" / name, folder / "labels" / name) for name in names},
        {"background": 0, "anterior": 1, "posterior": 2},
        ".nii.gz",
    )


def write_spinal_cords(write, folder: Path) -> str:
    cases = {}
    for site in ("ucl", "chum", "milan"):
        label = min((folder / site / "labels").glob("*.nii.gz"))
        stem = label.name.removesuffix(".nii.gz")
        image = next(path for path in sorted((folder / site / "images").iterdir()) if path.name.startswith(stem))
        cases[f"{site}_{stem}"] = (image, label)
    return write("Dataset982_SpinalCord", cases, {"background": 0, "white": 1, "gray": 2}, ".nii.gz")


def write_fundus_photographs(write, folder: Path) -> str:
    from skimage import io

    def convert(source: Path, target: Path) -> None:
        array = io.imread(source)
        io.imsave(target, array if "imagesTr" in str(target) else (array > 0).astype(np.uint8), check_contrast=False)

    cases = {}
    for image in sorted((folder / "images").iterdir())[:2]:
        label = next(path for path in sorted((folder / "labels").iterdir()) if path.name.startswith(image.stem))
        cases[image.stem] = (image, label)
    return write("Dataset983_Retina", cases, {"background": 0, "vessel": 1}, ".png", link=convert)


def write_odd_ct(write, folder: Path) -> str:
    import SimpleITK as sitk

    label_file = folder / "nnunet_example_ct_sm_T300_output.nii.gz"
    labels = np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(label_file)))).astype(int)
    return write(
        "Dataset984_CT",
        {"ct": (folder / "nnunet_example_ct_sm.nii.gz", label_file)},
        {"background": 0, **{f"organ {i}": i for i in range(1, int(labels.max()) + 1)}},
        ".nii.gz",
        "CT",
    )


def write_odd_nrrd(write, folder: Path) -> str:
    return write(
        "Dataset985_Brain",
        {"brain": (folder / "pr_brain1_image.nrrd", folder / "pr_brain1_label.nrrd")},
        {"background": 0, "lesion": 1},
        ".nrrd",
    )
