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
