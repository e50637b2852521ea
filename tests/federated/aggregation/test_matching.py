"""Networks of different depth share what they have in common, and a hopeless match is refused with its cause."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2.federated.aggregation.matching import (
    check_names,
    choose_owners,
    count_parameters,
    describe_tensors,
    distinct_tensors,
    match_by,
    match_tensors,
    normalise_name,
)
from nnunetv2.federated.errors import MatchingError
from nnunetv2.federated.protocol.messages import Match, TensorEntry

NETWORKS = {
    "plain": (PlainConvUNet, {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}),
    "residual": (ResidualEncoderUNet, {"n_blocks_per_stage": 2, "n_conv_per_stage_decoder": 1}),
}


def make_network(stages, *, kind="plain", dimensions=3, kernels=None, input_channels=1, classes=3):
    """Make a network as nnU-Net plans it, with random memory as weights: no time is spent on drawing them."""
    network_class, blocks = NETWORKS[kind]
    largest = 320 if dimensions == 3 else 512
    with torch.device("meta"):
        network = network_class(
            input_channels=input_channels,
            n_stages=stages,
            num_classes=classes,
            features_per_stage=[min(largest, 32 * 2**stage) for stage in range(stages)],
            conv_op=nn.Conv3d if dimensions == 3 else nn.Conv2d,
            kernel_sizes=kernels or [[3] * dimensions] * stages,
            strides=[[1] * dimensions] + [[2] * dimensions] * (stages - 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm3d if dimensions == 3 else nn.InstanceNorm2d,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            deep_supervision=True,
            **blocks,
        )
    return network.to_empty(device="cpu")


@cache
def manifest_of(stages, **options):
    """Return what a site with such a network registers."""
    options = {
        name: [list(kernel) for kernel in value] if name == "kernels" else value for name, value in options.items()
    }
    return describe_tensors(distinct_tensors(make_network(stages, **options).state_dict())[0])


def entries(**tensors):
    """Make a manifest; underscores between names are dots, values are shapes or (dtype, shape)."""
    pairs = {
        name.replace("__", "."): value if isinstance(value[0], str) else ("F32", value)
        for name, value in tensors.items()
    }
    return tuple(TensorEntry(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in pairs.items())


def share(matching, site):
    shared, total = matching.coverage[site]
    return shared / total


# --------------------------------------------------------------------------------------------------- distinct tensors
def test_a_network_has_fewer_tensors_than_names():
    state = make_network(6).state_dict()
    distinct, aliases = distinct_tensors(state)
    assert (len(state), len(distinct), len(aliases)) == (292, 108, 184)
    assert distinct.keys() | aliases.keys() == state.keys()
    first = "encoder.stages.0.0.convs.0"
    assert (
        aliases[f"decoder.{first}.all_modules.0.weight"]
        == aliases[f"{first}.all_modules.0.weight"]
        == f"{first}.conv.weight"
    )
    assert all(state[alias].data_ptr() == distinct[name].data_ptr() for alias, name in aliases.items())
    assert 31.1e6 < count_parameters(describe_tensors(distinct)) < 31.3e6
    assert not any("all_modules" in name or "decoder.encoder" in name for name in distinct)


def test_views_of_one_memory_are_not_aliases_unless_they_are_equal():
    memory = torch.zeros(12)
    state = {
        "a": memory.view(3, 4),
        "b": memory.view(4, 3),
        "c": memory[:6],
        "d": memory[6:],
        "e": memory.view(3, 4),
        "empty": torch.zeros(0),
        "void": torch.zeros(0),
        "f": memory.view(torch.int32).view(3, 4),
    }
    assert distinct_tensors(state)[1] == {"e": "a"}


def test_tensors_are_described_by_name_dtype_and_shape():
    described = describe_tensors(
        {
            "w": torch.zeros(2, 3),
            "h": torch.zeros(1, dtype=torch.float16),
            "n": torch.tensor(0),
            "b": torch.zeros(4, dtype=torch.bool),
        }
    )
    assert described == entries(w=(2, 3), h=("F16", (1,)), n=("I64", ()), b=("BOOL", (4,)))
    with pytest.raises(MatchingError, match="tensor c has dtype torch.complex64"):
        describe_tensors({"c": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "name",
    ["encoder.w", "module.encoder.w", "_orig_mod.encoder.w", "module._orig_mod.encoder.w", "encoder._orig_mod.w"],
)
def test_wrappers_do_not_change_a_name(name):
    assert normalise_name(name) == "encoder.w"


# ------------------------------------------------------------------------------------------------------ real networks
@pytest.mark.parametrize(("stages", "by_name"), [((6, 7), (0.74, 0.51)), ((6, 5), (0.27, 0.51))])
def test_by_name_networks_of_different_depth_share_part(stages, by_name):
    matching = match_by("name", {"A": manifest_of(stages[0]), "B": manifest_of(stages[1])})
    assert (share(matching, "A"), share(matching, "B")) == (
        pytest.approx(by_name[0], abs=0.01),
        pytest.approx(by_name[1], abs=0.01),
    )


def test_by_name_no_decoder_convolution_of_5_and_6_stages_is_shared():
    matching = match_by("name", {"A": manifest_of(5), "B": manifest_of(6)})
    assert not [name for name in matching.shared if "decoder" in name and name.endswith("conv.weight")]


@pytest.mark.parametrize(
    ("smaller", "larger", "options"),
    [(6, 7, {}), (5, 6, {}), (5, 7, {}), (7, 8, {"dimensions": 2}), (5, 6, {"kind": "residual"})],
)
def test_by_resolution_the_smaller_network_is_shared_whole(smaller, larger, options):
    matching = match_by("resolution", {"A": manifest_of(smaller, **options), "B": manifest_of(larger, **options)})
    assert share(matching, "A") == 1
    assert share(matching, "B") < 1
    assert matching.shared["decoder.seg_layers.r0.weight"] == {
        "A": f"decoder.seg_layers.{smaller - 2}.weight",
        "B": f"decoder.seg_layers.{larger - 2}.weight",
    }


@pytest.mark.parametrize("rule", ["name", "resolution"])
def test_equal_networks_share_everything(rule):
    matching = match_by(rule, {"A": manifest_of(6), "B": manifest_of(6), "C": manifest_of(6)})
    assert all(share(matching, site) == 1 for site in "ABC")
    assert len(matching.shared) == 108
    assert all(sorted(sites) == ["A", "B", "C"] for sites in matching.shared.values())
    assert matching.entries.keys() == matching.shared.keys()


def test_three_depths_share_in_subsets():
    manifests = {"five": manifest_of(5), "six": manifest_of(6), "seven": manifest_of(7)}
    matching = match_tensors(manifests, rule="resolution")
    assert matching.shared["encoder.stages.0.0.convs.0.conv.weight"].keys() == {"five", "six", "seven"}
    assert matching.shared["encoder.stages.5.0.convs.0.conv.weight"].keys() == {"six", "seven"}
    assert "encoder.stages.6.0.convs.0.conv.weight" not in matching.shared
    assert share(matching, "six") == 1


def test_only_layers_that_differ_stay_local():
    flat = ((1, 3, 3),) + ((3, 3, 3),) * 5
    matching = match_tensors({"A": manifest_of(6), "B": manifest_of(6, kernels=flat)}, rule="name")
    missing = {entry.name for entry in manifest_of(6)} - matching.shared.keys()
    first_level = (
        "encoder.stages.0.0.convs.0",
        "encoder.stages.0.0.convs.1",
        "decoder.stages.4.convs.0",
        "decoder.stages.4.convs.1",
    )
    assert missing == {f"{block}.conv.{leaf}" for block in first_level for leaf in ("weight", "bias")}


def test_a_compiled_site_is_no_different():
    compiled = tuple(entry.model_copy(update={"name": f"_orig_mod.{entry.name}"}) for entry in manifest_of(6))
    matching = match_tensors({"A": manifest_of(6), "B": compiled}, rule="resolution")
    assert share(matching, "B") == 1
    assert (
        matching.shared["encoder.stages.0.0.convs.0.conv.bias"]["B"] == "_orig_mod.encoder.stages.0.0.convs.0.conv.bias"
    )


def test_the_order_of_sites_does_not_matter():
    manifests = {"A": manifest_of(5), "B": manifest_of(6), "C": manifest_of(7), "D": manifest_of(6, classes=4)}
    matchings = [match_by("resolution", dict(order)) for order in itertools.permutations(manifests.items())]
    assert all(
        matching == matchings[0] and list(matching.shared) == list(matchings[0].shared) for matching in matchings
    )


def test_a_match_travels_as_a_message():
    manifests = {"A": manifest_of(6), "B": manifest_of(7)}
    matching = match_tensors(manifests, rule="resolution")
    weights = {"A": 10, "B": 20}
    match = Match(
        rule="resolution",
        weighting="cases",
        weights=weights,
        shared=matching.shared,
        initial_owner=choose_owners(matching.shared, weights),
        coverage=matching.coverage,
    )
    assert set(match.initial_owner.values()) == {"B"}


# ----------------------------------------------------------------------------------------------------- small examples
def test_a_layer_is_shared_whole_or_not_at_all():
    manifests = {
        "A": entries(c__weight=(2, 3), c__bias=(2,)),
        "B": entries(c__weight=(2, 5), c__bias=(2,)),
        "C": entries(c__weight=(2, 3)),
    }
    assert match_by("name", manifests).shared == {}


def test_one_odd_site_does_not_end_the_sharing_of_the_others():
    odd, even = entries(c__weight=(9,), d__weight=(4,)), entries(c__weight=(2,), d__weight=(4,))
    matching = match_by("name", {"A": even, "B": odd, "C": even})
    assert matching.shared == {
        "c.weight": {"A": "c.weight", "C": "c.weight"},
        "d.weight": dict.fromkeys("ABC", "d.weight"),
    }
    assert matching.coverage == {"A": (6, 6), "B": (4, 13), "C": (6, 6)}


def test_each_group_of_shapes_is_a_tensor_of_its_own():
    wide, narrow = entries(c__weight=(8, 2), c__bias=(8,)), entries(c__weight=(4, 2), c__bias=(4,))
    matching = match_by("name", {"A": wide, "B": narrow, "C": wide, "D": narrow, "E": entries(c__weight=(1, 2))})
    assert {name: sorted(sites) for name, sites in matching.shared.items()} == {
        "c.weight#8x2": ["A", "C"],
        "c.bias#8x2": ["A", "C"],
        "c.weight#4x2": ["B", "D"],
        "c.bias#4x2": ["B", "D"],
    }
    assert matching.entries["c.bias#4x2"].shape == (4,)


def test_groups_whose_largest_tensors_agree_stay_apart():
    one, two = entries(c__weight=(8, 2), c__bias=(8,)), entries(c__weight=(8, 2))
    matching = match_by("name", {"A": one, "B": one, "C": two, "D": two})
    assert sorted(sorted(sites) for sites in matching.shared.values()) == [["A", "B"], ["A", "B"], ["C", "D"]]


def test_integers_are_never_shared():
    norm = entries(n__weight=(4,), n__running_mean=(4,), n__num_batches_tracked=("I64", ()))
    matching = match_by("name", {"A": norm, "B": norm})
    assert sorted(matching.shared) == ["n.running_mean", "n.weight"]
    assert matching.coverage["A"] == (8, 8)


def test_owners_are_the_sites_with_the_largest_weight():
    shared = {"v": {"A": "v", "B": "v"}, "w": {"B": "w", "C": "w"}, "x": {"B": "x", "D": "x"}}
    assert choose_owners(shared, {"A": 5, "B": 2, "C": 9, "D": 2}) == {"v": "A", "w": "C", "x": "B"}


# ----------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("other", "rule", "message"),
    [
        (lambda: entries(net__weight=(4, 4)), "name", "network classes differ"),
        (lambda: manifest_of(6, dimensions=2), "resolution", "3-dimensional weights, that of site B 2-dimensional"),
        (
            lambda: tuple(entry.model_copy(update={"dtype": "BF16"}) for entry in manifest_of(6)),
            "name",
            "weights of site B are neither float32 nor float16",
        ),
        (
            lambda: tuple(
                entry.model_copy(update={"shape": (*entry.shape[:-1], entry.shape[-1] + 1)}) for entry in manifest_of(6)
            ),
            "resolution",
            "Kernels or numbers of features differ .*in decoder",
        ),
    ],
)
def test_a_hopeless_match_is_refused_with_its_cause(other, rule, message):
    with pytest.raises(MatchingError, match=message):
        match_tensors({"A": manifest_of(6), "B": other()}, rule=rule)


def test_a_difference_in_depth_suggests_the_other_rule():
    deep = entries(decoder__stages__0__weight=(90,), decoder__stages__1__weight=(50,), encoder__weight=(3,))
    shallow = entries(decoder__stages__0__weight=(50,), encoder__weight=(3,))
    with pytest.raises(MatchingError, match="--matching resolution"):
        match_tensors({"A": deep, "B": shallow}, rule="name")
    assert share(match_tensors({"A": deep, "B": shallow}, rule="resolution"), "B") == 1


def test_one_site_is_no_federation():
    with pytest.raises(MatchingError, match="at least 2 sites"):
        match_tensors({"A": entries(w=(3,))}, rule="name")


def test_one_site_among_many_that_shares_nothing_is_named():
    with pytest.raises(MatchingError, match="site C shares only 0 of its 9 parameters"):
        match_tensors({"A": manifest_of(5), "B": manifest_of(5), "C": entries(other=(9,))}, rule="name")


# --------------------------------------------------------------------------------------------- what sites are told
@pytest.mark.parametrize("rule", ["name", "resolution"])
def test_sites_find_the_names_right_that_a_match_gives_to_their_tensors(rule):
    manifests = {"A": manifest_of(6), "B": manifest_of(5), "C": manifest_of(6, kind="residual"), "D": manifest_of(5)}
    manifests["E"] = manifests["F"] = manifest_of(5, kernels=((1, 3, 3),) + ((3, 3, 3),) * 4)
    shared = match_tensors(manifests, rule=rule).shared
    assert any("#" in name for name in shared)
    for site, manifest in manifests.items():
        names = {name: sites[site] for name, sites in shared.items() if site in sites}
        check_names(names, manifest, rule=rule)
        first, second = next(
            (one, other) for one, other in itertools.combinations(names, 2) if one.split("#")[0] != other.split("#")[0]
        )
        with pytest.raises(MatchingError, match="which by the rule"):
            check_names({**names, first: names[second], second: names[first]}, manifest, rule=rule)
