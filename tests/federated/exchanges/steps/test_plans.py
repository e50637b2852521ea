"""Plans that agree, and the field in which they do not."""

import pytest
from fake_federation import make_plans

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.steps.plans import agree_on_plans


def test_equal_plans_agree_whatever_the_dataset_is_called():
    plans = {
        "A": make_plans(image_reader_writer="SimpleITKIO"),
        "B": make_plans(dataset_name="Dataset002_Other", image_reader_writer="NibabelIO"),
    }
    assert agree_on_plans(plans) == agree_on_plans({"C": make_plans()})


def test_plans_that_differ_are_refused_with_the_field():
    other = make_plans()
    other["configurations"] = {"3d_fullres": {"patch_size": [16, 16, 32]}}
    with pytest.raises(RefusedError) as info:
        agree_on_plans({"A": make_plans(), "B": other, "C": make_plans()})
    assert info.value.message == (
        "the plans differ: plans.configurations.3d_fullres.patch_size[2] is not the same at A, C and at B"
    )


def test_the_refusal_of_plans_that_differ_names_the_option_that_lets_them():
    with pytest.raises(RefusedError) as info:
        agree_on_plans({"A": make_plans(), "B": make_plans(plans_name="other")})
    assert "--networks own" in info.value.remedy


def test_networks_of_their_own_may_differ_and_what_the_data_decide_may_not():
    def plans(**changes) -> dict:
        configuration = {"spacing": [1.0, 1.0, 1.0], "patch_size": [16, 16, 16], **changes}
        return make_plans(configurations={"3d_fullres": configuration})

    one = {"A": plans(), "B": plans(patch_size=[8, 8, 8], batch_size=9)}
    assert agree_on_plans(one, "own") == agree_on_plans({"C": plans()}, "own")
    with pytest.raises(RefusedError) as info:
        agree_on_plans({**one, "C": plans(spacing=[1.0, 2.0, 1.0])}, "own")
    assert info.value.message == (
        "the plans differ: plans.configurations.3d_fullres.spacing[1] is not the same at A, B and at C"
    )
    assert "-overwrite_target_spacing" in info.value.remedy and "own." not in info.value.remedy


def test_why_low_resolutions_differ_is_explained():
    def plans(spacing: float) -> dict:
        return make_plans(configurations={"3d_lowres": {"spacing": [spacing] * 3}})

    with pytest.raises(RefusedError, match="configurations.3d_lowres.spacing") as info:
        agree_on_plans({"A": plans(2.0), "B": plans(2.5)}, "own")
    assert "train 2d or 3d_fullres" in info.value.remedy
