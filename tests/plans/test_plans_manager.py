"""Plans, their configurations, and the networks they describe."""

import json
import pickle
from functools import partial

import pytest
import torch

from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

OLD = {
    "data_identifier": "nnUNetPlans_3d",
    "patch_size": [16, 16, 16],
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 4,
    "unet_max_num_features": 12,
    "n_conv_per_stage_encoder": [1, 1, 1],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_kernel_sizes": [[3, 3, 3]] * 3,
    "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "num_pool_per_axis": [2, 2, 2],
}


def make_plans(**configurations) -> dict:
    return {
        "dataset_name": "Dataset001_X",
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
    }


def test_plans_from_file_and_dict(tmp_path):
    content = make_plans(a={"spacing": [1, 2, 3]})
    (tmp_path / "plans.json").write_text(json.dumps(content))
    for source in (content, tmp_path / "plans.json", f"{tmp_path}/plans.json"):
        manager = PlansManager(source)
        assert manager.plans == content and repr(manager) == repr(content)
        assert manager.dataset_name == "Dataset001_X" and manager.available_configurations == ["a"]
        assert manager.image_reader_writer_class is SimpleITKIO
        assert manager.label_manager_class is LabelManager
    assert PlansManager(content).plans is content


def test_configuration_is_cached_and_a_copy():
    content = make_plans(a={"patch_size": [1, 2, 3]})
    manager = PlansManager(content)
    configuration = manager.get_configuration("a")
    assert manager.get_configuration("a") is configuration
    assert PlansManager(content).get_configuration("a") is not configuration
    configuration.configuration["patch_size"][0] = 7
    assert configuration.patch_size == [7, 2, 3]
    assert content["configurations"]["a"]["patch_size"] == [1, 2, 3]


def test_child_overrides_its_parents_key_by_key():
    manager = PlansManager(
        make_plans(
            a={"batch_size": 2, "spacing": [1, 1, 1], "architecture": {"arch_kwargs": {"strides": [1]}}},
            b={"inherits_from": "a", "batch_size": 3, "next_stage": "c"},
            c={"inherits_from": "b", "architecture": {"network_class_name": "X"}, "previous_stage": "b"},
        )
    )
    c = manager.get_configuration("c")
    assert (c.batch_size, c.spacing, c.previous_stage_name) == (3, [1, 1, 1], "b")
    assert c.configuration["architecture"] == {"network_class_name": "X"}
    assert c.configuration["inherits_from"] == "b"
    assert manager.get_configuration("b").next_stage_names == ["c"]
    assert manager.get_configuration("a").next_stage_names is manager.get_configuration("a").previous_stage_name is None
    assert manager.get_configuration("b").pool_op_kernel_sizes == [1]


def test_bad_inheritance_is_explained():
    manager = PlansManager(make_plans(a={"inherits_from": "b"}, b={"inherits_from": "a"}, c={"inherits_from": "x"}))
    with pytest.raises(RuntimeError, match="a -> b -> a"):
        manager.get_configuration("a")
    with pytest.raises(ValueError, match="'x'"):
        manager.get_configuration("c")
    with pytest.raises(RuntimeError, match="available: a, b, c"):
        manager.get_configuration("typo")


def test_old_name_of_intensity_properties():
    assert PlansManager(
        {"foreground_intensity_properties_by_modality": {"0": {}}}
    ).foreground_intensity_properties_per_channel == {"0": {}}


def test_label_manager_of_a_dataset():
    dataset = {"labels": {"background": 0, "a": (1, 2), "b": 2}, "regions_class_order": [1, 2]}
    manager = PlansManager(make_plans())
    assert manager.get_label_manager(dataset).has_regions
    assert not manager.get_label_manager(dataset, force_use_labels=True).has_regions


def test_unknown_classes_are_named():
    plans = PlansManager(
        {
            **make_plans(a={"preprocessor_name": "TypoPreprocessor"}),
            "image_reader_writer": "TypoIO",
            "experiment_planner_used": "TypoPlanner",
        }
    )
    for look_up, name in (
        (lambda: plans.get_configuration("a").preprocessor_class, "TypoPreprocessor"),
        (lambda: plans.image_reader_writer_class, "TypoIO"),
        (lambda: plans.experiment_planner_class, "TypoPlanner"),
    ):
        with pytest.raises(RuntimeError, match=name):
            look_up()


def test_resampling_functions_are_bound_to_their_keywords():
    keys = {f"resampling_fn_{what}": "no_resampling_hack" for what in ("data", "seg", "probabilities")}
    manager = ConfigurationManager({**keys, **{f"{key}_kwargs": {} for key in keys}})
    assert isinstance(manager.resampling_fn_seg, partial)
    assert manager.resampling_fn_data("data", None, None, None) == "data"
    assert manager.resampling_fn_probabilities is manager.resampling_fn_probabilities
    assert pickle.loads(pickle.dumps(manager)).resampling_fn_data("data", None, None, None) == "data"


def test_managers_pickle_after_use():
    manager = PlansManager(make_plans(a={"batch_size": 2}))
    manager.get_configuration("a")
    assert manager.image_reader_writer_class
    copy = pickle.loads(pickle.dumps(manager))
    assert copy.get_configuration("a").batch_size == 2 and copy.image_reader_writer_class is SimpleITKIO


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("dim", [2, 3])
def test_old_configuration_yields_a_network(name, dim):
    old = {
        **OLD,
        "UNet_class_name": name,
        "patch_size": [16] * dim,
        "conv_kernel_sizes": [[3] * dim] * 3,
        "pool_op_kernel_sizes": [[1] * dim, [2] * dim, [2] * dim],
    }
    before = json.dumps(old)
    with pytest.warns(UserWarning, match="before 2.4"):
        manager = ConfigurationManager(old)
    assert json.dumps(old) == before
    assert set(manager.configuration) == {"data_identifier", "patch_size", "architecture"}
    assert manager.network_arch_init_kwargs["features_per_stage"] == [4, 8, 12]
    network = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        2,
        3,
        deep_supervision=True,
    )
    output = network(torch.zeros(1, 2, *[16] * dim))
    assert [tuple(entry.shape) for entry in output] == [(1, 3, *[16] * dim), (1, 3, *[8] * dim)]
    assert manager.pool_op_kernel_sizes == old["pool_op_kernel_sizes"]


def test_old_configurations_that_cannot_be_read():
    with pytest.raises(RuntimeError, match="MyNet"):
        ConfigurationManager({**OLD, "UNet_class_name": "MyNet"})
    with pytest.raises(ValueError, match="conv_kernel_sizes"):
        ConfigurationManager({key: value for key, value in OLD.items() if key != "conv_kernel_sizes"})


KWARGS = {
    "n_stages": 2,
    "features_per_stage": [4, 8],
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "kernel_sizes": 3,
    "strides": [1, 2],
    "n_conv_per_stage": 1,
    "n_conv_per_stage_decoder": 1,
    "norm_op": None,
    "nonlin": "torch.nn.LeakyReLU",
}
IMPORTED = ["conv_op", "norm_op", "nonlin"]


def test_network_class_that_moved_is_found():
    before = dict(KWARGS)
    with pytest.warns(UserWarning, match="searching"):
        network = get_network_from_plans("dynamic_network_architectures.gone.PlainConvUNet", KWARGS, IMPORTED, 1, 2)
    assert type(network).__name__ == "PlainConvUNet"
    assert before == KWARGS


def test_networks_that_cannot_be_built():
    path = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    with pytest.warns(UserWarning, match="NoSuchNet"), pytest.raises(ImportError, match="NoSuchNet"):
        get_network_from_plans("a.b.NoSuchNet", KWARGS, IMPORTED, 1, 2)
    with pytest.raises(ValueError, match=r"no torch\.nn\.Module"):
        get_network_from_plans("os.system", {}, [], 1, 2)
    with pytest.raises(ImportError, match="no.such"):
        get_network_from_plans(path, {**KWARGS, "conv_op": "no.such.Conv"}, IMPORTED, 1, 2)
    with pytest.raises(KeyError, match="dropout_op"):
        get_network_from_plans(path, KWARGS, [*IMPORTED, "dropout_op"], 1, 2)


def test_arguments_that_a_network_does_not_take_are_named():
    edited = {**KWARGS, "n_stagesx": 3}
    network = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    with pytest.raises(
        ValueError, match="arch_kwargs in the plans do not fit the network PlainConvUNet: .*'n_stagesx'"
    ):
        get_network_from_plans(network, edited, IMPORTED, 1, 2)


def test_initialisation_is_optional():
    path = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    for allow_init in (True, False):
        network = get_network_from_plans(path, {**KWARGS, "conv_bias": True}, IMPORTED, 1, 2, allow_init)
        bias = network.encoder.stages[0][0].convs[0].conv.bias
        assert bool(bias.eq(0).all()) is allow_init
