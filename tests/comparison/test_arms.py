"""Arms by name and from a file."""

import json

import pytest

from nnunetv2.comparison.arms import ARMS, Arm, choose_arms, read_arms
from nnunetv2.utilities.json_files import JsonFileError


def test_arms_are_chosen_by_name_in_their_order():
    mine = Arm(name="mine", training="alone")
    assert choose_arms(["ffe", "mine", "alone"], {"mine": mine}) == (ARMS["ffe"], mine, ARMS["alone"])
    for names, message in ((["fee"], "no arm 'fee'. Arms: alone"), (["ffe", "ffe"], "named twice")):
        with pytest.raises(ValueError, match=message):
            choose_arms(names, {})


def test_arms_that_plan_alike_share_their_preprocessed_data():
    assert ARMS["ffe"].plan_group == ARMS["ffe-uniform"].plan_group != ARMS["asym"].plan_group
    assert ARMS["asym"].plan_group == ARMS["asym-resolution"].plan_group != ARMS["alone"].plan_group
    assert ARMS["pooled"].plan_group == ARMS["pooled-all"].plan_group


def test_a_file_defines_further_arms(tmp_path):
    file = tmp_path / "arms.json"
    file.write_text(json.dumps({"half": {"training": "federated", "coordinator_options": ["--precision", "float16"]}}))
    assert read_arms(file) == {
        "half": Arm(name="half", training="federated", coordinator_options=("--precision", "float16"))
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ffe", {"training": "alone"}, "'ffe' cannot name an arm"),
        ("../x", {"training": "alone"}, "cannot name an arm"),
        ("a", {}, "needs the field 'training'"),
        ("a", {"training": "together"}, "training is 'together', not alone or pooled or federated"),
        ("a", {"training": "alone", "lr": 1}, "no field 'lr'. Fields: budget"),
        ("a", {"training": "alone", "training_options": "--epochs 3"}, "training_options must be a list of texts"),
        ("a", {"training": "alone", "trainer": 3}, "trainer must be a text, it is 3"),
        ("a", ["alone"], "must be given in braces"),
    ],
)
def test_a_wrong_arm_is_named_with_its_field(tmp_path, name, content, message):
    file = tmp_path / "arms.json"
    file.write_text(json.dumps({name: content}))
    with pytest.raises(JsonFileError, match=message) as caught:
        read_arms(file)
    assert str(file) in str(caught.value)


def test_arms_whose_planning_options_differ_in_a_dot_share_nothing():
    arms = [Arm(name=n, training="alone", planning_options=("-gpu_memory_target", n)) for n in ("2.5", "25")]
    assert len({arm.plan_group for arm in (*arms, ARMS["alone"])}) == 3


OWN = {
    "training": "federated",
    "networks": "own",
    "planning_options_of": {"Dataset501_A": ["-gpu_memory_target", "0.5"], "Dataset502_B": ["-pl", "X"]},
}


def test_sites_of_an_arm_can_plan_with_options_of_their_own(tmp_path):
    file = tmp_path / "arms.json"
    file.write_text(json.dumps({"own": OWN, "name": {**OWN, "coordinator_options": ["--matching", "name"]}}))
    own, by_name = read_arms(file).values()
    assert own.planning_options_at("Dataset501_A") == ("-gpu_memory_target", "0.5")
    assert own.planning_options_at("Dataset503_C") == ()
    assert own.networks_options == ("--networks", "own") and ARMS["ffe"].networks_options == ()
    assert own.plan_group == by_name.plan_group != ARMS["ffe"].plan_group
    assert own.describe(3) == (
        "the sites train together over a coordinator, with plans from the pooled fingerprint, and networks of their "
        "own (Dataset501_A: -gpu_memory_target 0.5; Dataset502_B: -pl X)"
    )


def test_arms_whose_sites_plan_otherwise_share_nothing():
    options = ({}, {"A": ("-x", "1")}, {"B": ("-x", "1")}, {"A": ("-x 1",)})
    arms = [
        Arm(name=str(n), training="federated", networks="own", planning_options_of=o) for n, o in enumerate(options)
    ]
    assert len({arm.plan_group for arm in (*arms, ARMS["ffe"])}) == len(options) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": "mine"}, "networks is 'mine', not equal or own"),
        ({"planning": "asym"}, "networks of their own need training federated, and planning ffe"),
        ({"training": "alone"}, "networks of their own need training federated"),
        ({"planning_options_of": ["-pl"]}, "planning_options_of must be in braces"),
        ({"planning_options_of": {"A": "-pl"}}, "planning_options_of.A must be a list of texts"),
    ],
)
def test_an_arm_of_networks_that_cannot_be_is_named(tmp_path, changes, message):
    file = tmp_path / "arms.json"
    file.write_text(json.dumps({"own": {**OWN, **changes}}))
    with pytest.raises(JsonFileError, match=message):
        read_arms(file)
