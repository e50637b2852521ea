"""What sites with networks of their own compare and register: what the data decide, and no more of their GPU."""

from __future__ import annotations

import json

import pytest
from tiny_dataset import make_configuration, make_plans

from nnunetv2.federated.exchanges.consistency import comparable_plans
from nnunetv2.federated.privacy.own_networks import (
    DECIDED_BY_DATA_PER_CONFIGURATION,
    OWN_PLANS,
    data_part,
    name_to_compare,
    plans_to_compare,
    plans_to_register,
    resolve,
)


def cascade_plans(*, spacing_of_lowres=2.0, **own) -> dict:
    plans = make_plans(**own)
    lowres = make_configuration(spacing=[spacing_of_lowres] * 3, next_stage="3d_cascade_fullres")
    return {
        **plans,
        "plans_name": "nnUNetPlans_6GB",
        "configurations": {
            "2d": make_configuration(dims=2, **own),
            "3d_lowres": lowres,
            **plans["configurations"],
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }


def test_plans_of_networks_that_differ_agree_where_the_data_decide():
    small, large = cascade_plans(stages=2, batch_size=2), cascade_plans(stages=4, batch_size=49)
    large["configurations"]["3d_fullres"]["patch_size"] = [999, 999, 999]
    large.update(plans_name="nnUNetResEncUNetLPlans", experiment_planner_used="nnUNetPlannerResEncL")
    del large["configurations"]["3d_lowres"], large["configurations"]["3d_cascade_fullres"]
    compared = [plans_to_compare(plans, "own") for plans in (small, large)]
    assert compared[0] == compared[1]
    assert list(compared[0]["configurations"]) == ["2d", "3d_fullres"]
    assert plans_to_compare(small, "equal") == small
    assert (name_to_compare("x", "equal"), name_to_compare("x", "own")) == ("x", OWN_PLANS)


@pytest.mark.parametrize(
    ("change", "decides"),
    [
        ({"transpose_forward": [1, 0, 2]}, True),
        ({"foreground_intensity_properties_per_channel": {"0": {"mean": 7.0}}}, True),
        ({"plans_name": "mine", "experiment_planner_used": "Mine"}, False),
        ({"dataset_name": "Dataset007_Other", "image_reader_writer": "NibabelIO"}, False),
    ],
)
def test_fields_of_plans_that_the_data_decide_are_compared(change, decides):
    plans = make_plans()
    assert (comparable_plans({**plans, **change}, "own") != comparable_plans(plans, "own")) == decides


@pytest.mark.parametrize("name", make_configuration())
def test_fields_of_a_configuration_that_the_data_decide_are_compared(name):
    plans, other = make_plans(), make_plans()
    other["configurations"]["3d_fullres"][name] = "other"
    decides = name in DECIDED_BY_DATA_PER_CONFIGURATION
    assert decides == (name not in ("data_identifier", "batch_size", "patch_size", "architecture", "batch_dice"))
    assert (comparable_plans(other, "own") != comparable_plans(plans, "own")) == decides


@pytest.mark.parametrize("configuration", ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"])
def test_a_registration_tells_network_and_patch_of_what_is_trained_and_no_more_of_the_gpu(configuration):
    plans = cascade_plans(batch_size=4321, architecture={"arch_kwargs": "secret"})
    plans["configurations"][configuration] = {
        **resolve(plans, configuration),
        **plans["configurations"][configuration],
        "architecture": "network",
        "patch_size": [77],
    }
    registered = plans_to_register(plans, configuration)
    text = json.dumps(registered)
    assert "6GB" not in text and "4321" not in text and "secret" not in text and "ExperimentPlanner" not in text
    assert registered["plans_name"] == OWN_PLANS
    described = registered["configurations"]
    assert described[configuration]["architecture"] == "network" and described[configuration]["patch_size"] == [77]
    assert all("architecture" not in one for name, one in described.items() if name != configuration)
    assert ("3d_lowres" in described) == ("lowres" in configuration or "cascade" in configuration)
    assert plans_to_register(registered, configuration) == registered


def test_a_cascade_is_compared_with_the_stage_before():
    plans = [plans_to_register(cascade_plans(spacing_of_lowres=mm), "3d_cascade_fullres") for mm in (2.0, 2.5)]
    assert comparable_plans(plans[0], "own") != comparable_plans(plans[1], "own")


@pytest.mark.parametrize(
    "configurations",
    [
        None,
        [],
        3,
        {"a": 3},
        {"a": {"inherits_from": "a"}},
        {"a": {"inherits_from": ["a"]}},
        {"a": {"inherits_from": "b"}},
    ],
)
def test_plans_that_anybody_wrote_do_no_harm(configurations):
    plans = {"configurations": configurations}
    assert data_part(plans)["configurations"] in ({}, {"a": {}})
    assert plans_to_register(plans, "a")["plans_name"] == OWN_PLANS
