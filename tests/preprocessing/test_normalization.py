import numpy as np
import pytest

from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    CTNormalization,
    NoNormalization,
    RescaleTo01Normalization,
    RGBTo01Normalization,
    ZScoreNormalization,
)
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

STATISTICS = {"mean": 10.0, "std": 4.0, "percentile_00_5": 2.0, "percentile_99_5": 18.0}


def image(*values):
    return np.array(values, np.float32).reshape(1, 1, -1)


def test_z_score_of_four_values():
    normalized = ZScoreNormalization(False, {}).run(image(1, 3, 1, 3))
    np.testing.assert_allclose(normalized.ravel(), [-1, 1, -1, 1])
    assert normalized.dtype == np.float32


def test_z_score_within_the_mask_leaves_the_rest():
    seg = np.array([-1, 0, 2, -1]).reshape(1, 1, -1)
    normalized = ZScoreNormalization(True, {}).run(image(100, 1, 3, 0), seg)
    np.testing.assert_allclose(normalized.ravel(), [100, -1, 1, 0])


def test_z_score_survives_constants_and_empty_masks():
    assert (ZScoreNormalization(False, {}).run(image(5, 5)) == 0).all()
    outside = np.full((1, 1, 2), -1)
    assert (ZScoreNormalization(True, {}).run(image(5, 6), outside).ravel() == [5, 6]).all()


def test_z_score_within_the_mask_needs_the_mask():
    with pytest.raises(ValueError, match="needs the segmentation"):
        ZScoreNormalization(True, {}).run(image(1, 2))


def test_ct_clips_then_standardizes_with_the_dataset():
    normalized = CTNormalization(False, STATISTICS).run(image(-1000, 2, 10, 14, 3000))
    np.testing.assert_allclose(normalized.ravel(), [-2, -2, 0, 1, 2])


def test_ct_without_statistics_says_what_is_missing():
    with pytest.raises(ValueError, match="percentile_99_5"):
        CTNormalization(False, {"mean": 1, "std": 1, "percentile_00_5": 0}).run(image(1))


def test_rescaling_and_no_normalization():
    np.testing.assert_allclose(RescaleTo01Normalization(False, {}).run(image(5, 7, 9)).ravel(), [0, 0.5, 1])
    assert (RescaleTo01Normalization(False, {}).run(image(5, 5)) == 0).all()
    unchanged = NoNormalization(False, {}).run(np.array([[[1, 2]]], np.uint8))
    assert unchanged.dtype == np.float32
    assert unchanged.ravel().tolist() == [1, 2]


def test_rgb_refuses_other_ranges():
    np.testing.assert_allclose(RGBTo01Normalization(False, {}).run(image(0, 51, 255)).ravel(), [0, 0.2, 1])
    for values in ((-1, 3), (0, 256)):
        with pytest.raises(AssertionError, match="between 0 and 255"):
            RGBTo01Normalization(False, {}).run(image(*values))


def test_half_precision_guards_against_its_own_underflow():
    normalized = ZScoreNormalization(False, {}, np.float16).run(image(3, 3))
    assert normalized.dtype == np.float16
    assert np.isfinite(normalized).all()


def test_arguments_are_checked():
    assert ZScoreNormalization().intensityproperties == {}
    with pytest.raises(AssertionError, match="use_mask_for_norm"):
        ZScoreNormalization(1, {})
    with pytest.raises(AssertionError, match="must be a dict"):
        ZScoreNormalization(True, [])


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("CT", CTNormalization),
        ("noNorm", NoNormalization),
        ("zscore", ZScoreNormalization),
        ("T2", ZScoreNormalization),
        ("rescale_to_0_1", RescaleTo01Normalization),
        ("RGB_to_0_1", RGBTo01Normalization),
    ],
)
def test_channel_names_choose_the_scheme(name, scheme):
    assert get_normalization_scheme(name) is scheme
