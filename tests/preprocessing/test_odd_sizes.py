"""Images that hardly suit a model are named before they do harm."""

import numpy as np
import pytest
import SimpleITK as sitk
from preprocessing_scans import make_dataset_json, make_plans

from nnunetv2.errors import InvalidInputError
from nnunetv2.preprocessing import odd_sizes
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def run_case(tmp_path, shape, spacing, *, target=(5.0, 1.0, 1.0), **plans):
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(9, 1, shape).astype(np.float32))
    image.SetSpacing(spacing[::-1])
    file, label = (str(tmp_path / f"{name}.nii.gz") for name in ("a_0000", "a"))
    sitk.WriteImage(image, file)
    sitk.WriteImage(sitk.Cast(image, sitk.sitkUInt8) > 9, label)
    manager = PlansManager(make_plans(spacing=target, **plans))
    return DefaultPreprocessor(verbose=False).run_case(
        [file], label, manager, manager.get_configuration("3d_fullres"), make_dataset_json()
    )


@pytest.mark.parametrize(
    ("shape", "spacing", "kept", "transpose"),
    [
        ((2, 9, 8), (1.0, 1.0, 1.0), (1, 9, 8), (0, 1, 2)),
        ((9, 2, 8), (1.0, 1.0, 1.0), (1, 9, 8), (1, 0, 2)),
        ((4, 9, 8), (1e-3, 1e-3, 1e-3), (1, 1, 1), (0, 1, 2)),
    ],
    ids=["thin", "transposed", "micrometres"],
)
def test_a_thin_slab_keeps_a_voxel(tmp_path, caplog, shape, spacing, kept, transpose):
    data, seg, _ = run_case(tmp_path, shape, spacing, transpose=transpose)
    assert data.shape == seg.shape == (1, *kept)
    assert np.isfinite(data).all()
    assert "a_0000.nii.gz: " in caplog.text
    assert "Is its spacing right?" in caplog.text


def test_new_lengths_are_at_least_one():
    assert compute_new_shape((2, 4, 1), (1, 1, 1), (5, 1, 9)).tolist() == [1, 4, 1]
    assert compute_new_shape((0, 4, 1), (1, 1, 1), (5, 1, 9)).tolist() == [0, 4, 1]


def test_an_image_that_fits_no_memory_is_named_with_its_spacing(tmp_path, monkeypatch):
    monkeypatch.setattr(odd_sizes, "total_memory_bytes", lambda: 64 * 10**9)
    with pytest.raises(
        InvalidInputError,
        match=r"a_0000.nii.gz: 6 x 9 x 8 voxels with spacing 1000 x 1000 x 1000 mm "
        r"become 1200 x 9000 x 8000 voxels at the plans' spacing 5 x 1 x 1 mm, "
        r"which takes 34[56] GB, more than this machine's",
    ):
        run_case(tmp_path, (6, 9, 8), (1000.0, 1000.0, 1000.0))


def test_memory_that_runs_out_is_told_with_the_spacing(tmp_path, monkeypatch):
    def run_out(*arguments):
        raise MemoryError("no more")

    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    monkeypatch.setattr(ConfigurationManager, "resampling_fn_data", run_out, raising=False)
    with pytest.raises(MemoryError, match=r"a_0000.nii.gz: no more \(6 x 9 x 8 voxels with spacing 2 x 1 x 1 mm"):
        run_case(tmp_path, (6, 9, 8), (2.0, 1.0, 1.0))


def test_a_picture_for_a_3d_model_is_pointed_out(tmp_path, caplog):
    run_case(tmp_path, (9, 8), (1.0, 1.0))
    assert "a_0000.nii.gz is a 2D image, but the model is 3D: 1 x 9 x 8 voxels" in caplog.text
    caplog.clear()
    run_case(tmp_path, (9, 8), (1.0, 1.0), target=(1.0, 1.0))
    run_case(tmp_path, (1, 9, 8), (5.0, 1.0, 1.0))
    assert caplog.text == ""
