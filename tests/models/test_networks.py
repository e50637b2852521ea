import pytest
from torch import nn

from nnunetv2.models import networks


def test_the_lowest_resolution_has_no_output():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert networks.deep_supervision_scales(strides) == [[1, 1, 1], [1, 0.5, 0.5], [0.5, 0.25, 0.25]]
    assert networks.deep_supervision_scales([[1, 1], [2, 2]]) == [[1, 1]]


class FakeConfiguration:
    network_arch_class_name = "some.Net"
    network_arch_init_kwargs = {"n_stages": 2}
    network_arch_init_kwargs_req_import = ["conv_op"]


def build(builder):
    configuration = FakeConfiguration()
    arguments = networks.build_network(
        builder,
        plans_manager="plans",
        configuration_manager=configuration,
        dataset_json="json",
        num_input_channels=1,
        num_output_channels=3,
        enable_deep_supervision=True,
    )
    return ["configuration" if argument is configuration else argument for argument in arguments]


def test_builders_of_all_generations_are_called_with_their_own_arguments():
    def current(plans_manager, configuration_manager, num_input_channels, num_output_channels, ds=True):
        return plans_manager, configuration_manager, num_input_channels, num_output_channels, ds

    def before_2_3(plans_manager, dataset_json, configuration_manager, num_input_channels, enable_deep_supervision):
        return plans_manager, dataset_json, configuration_manager, num_input_channels, enable_deep_supervision

    def legacy(architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input, num_output, ds=True):
        return architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input, num_output, ds

    assert build(current) == ["plans", "configuration", 1, 3, True]
    assert build(before_2_3) == ["plans", "json", "configuration", 1, True]
    with pytest.warns(DeprecationWarning, match="build_network_architecture"):
        assert build(legacy) == ["some.Net", {"n_stages": 2}, ["conv_op"], 1, 3, True]


def test_deep_supervision_is_named_for_builders_with_more_parameters():
    def keyword_only(plans_manager, configuration_manager, num_input, num_output, *, enable_deep_supervision):
        return plans_manager, configuration_manager, num_input, num_output, enable_deep_supervision

    def with_another_before(plans_manager, configuration, num_in, num_out, width=8, enable_deep_supervision=False):
        return plans_manager, configuration, num_in, num_out, width, enable_deep_supervision

    def open_ended(plans_manager, configuration_manager, num_input, num_output, **others):
        return plans_manager, configuration_manager, num_input, num_output, others

    assert build(keyword_only) == ["plans", "configuration", 1, 3, True]
    assert build(with_another_before) == ["plans", "configuration", 1, 3, 8, True]
    assert build(open_ended) == ["plans", "configuration", 1, 3, {"enable_deep_supervision": True}]


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.again = nn.ModuleList([self.conv])


def test_prefixes_of_wrappers_are_removed_only_where_they_are_foreign():
    weights = {"module._orig_mod.a": 1, "module.b": 2, "c": 3}
    assert networks.adapt_weight_names(weights, {"a", "module.b", "c"}) == {"a": 1, "module.b": 2, "c": 3}
