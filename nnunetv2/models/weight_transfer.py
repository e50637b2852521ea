"""Carry weights over to a network with other input channels, classes or depth.

Every tensor of the new network meets one of these rules, in this order; where none applies, nothing is carried over:

    layers that output classes     a class takes the weights of the class of its name, or starts anew
    same name, same shape          taken
    first convolution, another     by the names of channels, or the mean of all; see `adapt_input_channels`
    number of input channels
    stage or block that the old    starts anew
    network does not have

Stages of an encoder are counted from the highest resolution, those of a decoder from the lowest. So a decoder of
another depth is compared from its last stage backwards: there both have the resolution of the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nnunetv2.federated.aggregation.matching import distinct_tensors
from nnunetv2.models.networks import adapt_weight_names
from nnunetv2.plans.label_manager import LabelManager

SEGMENTATION_LAYERS = ".seg_layers."

_DECODER_STAGE = re.compile(r"(?P<list>decoder\.(?:stages|transpconvs|seg_layers)\.)(?P<number>\d+)(?P<rest>\..*)")

Weights = Mapping[str, torch.Tensor]


class UnfitWeightsError(ValueError):
    """A tensor of a network has no counterpart, and no rule applies."""


@dataclass(frozen=True)
class ChannelsAndClasses:
    """Names of a network's inputs and outputs. Empty: not known."""

    channels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    """Names of labels, background first, or of regions."""
    are_regions: bool = False


UNKNOWN = ChannelsAndClasses()


@dataclass
class Transfer:
    """Initial values of a network's tensors, each under the first of its names."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """All that is to be written into the network."""
    taken: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    """Name -> how."""
    new: dict[str, str] = field(default_factory=dict)
    """Name -> why it starts anew."""
    left_out: list[str] = field(default_factory=list)
    """Tensors of the old network that the new one has no place for."""


def name_channels_and_classes(dataset_json: Mapping[str, Any], *, is_cascaded: bool) -> ChannelsAndClasses:
    """Return the names of a network's input channels and outputs, in their order.

    Args:
        dataset_json: Content of dataset.json.
        is_cascaded: Whether the network also sees the labels that a previous stage has found.
    """
    names = dataset_json.get("channel_names", dataset_json.get("modality"))
    channels = [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, Mapping) else []
    labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    if labels.has_regions:
        named = [name for name, value in labels.label_dict.items() if name != "ignore"]
        values = [labels.label_dict[name] for name in named]
        classes = [name for name, value in zip(named, values) if labels.filter_background([value])]
        seen = [str(label) for label in labels.foreground_labels]
    else:
        by_label = {_single(value): name for name, value in labels.label_dict.items()}
        classes = [by_label[int(label)] for label in labels.all_labels]
        seen = classes[1:]
    if is_cascaded:
        channels += [f"previous stage: {name}" for name in seen]
    return ChannelsAndClasses(tuple(channels), tuple(classes), labels.has_regions)


def fits_outside_heads(current: Mapping[str, torch.Tensor], weights: Weights) -> bool:
    """Tell whether weights fit, but for the layers that output classes."""
    return all(
        name in weights and weights[name].shape == tensor.shape
        for name, tensor in current.items()
        if SEGMENTATION_LAYERS not in name
    )


def plan_transfer(
    network: nn.Module,
    weights: Weights,
    *,
    old: ChannelsAndClasses = UNKNOWN,
    new: ChannelsAndClasses = UNKNOWN,
    keeps_classes: bool = True,
) -> Transfer:
    """Decide the initial values of a network's tensors; nothing is written yet.

    Args:
        network: Without the wrappers of DDP and torch.compile.
        weights: State dict of the other network, perhaps with their prefixes.
        old: Its channels and classes.
        new: Those of `network`.
        keeps_classes: Whether classes of the same name keep their weights, or all start anew.

    Raises:
        UnfitWeightsError: No rule applies to a tensor.
    """
    state = network.state_dict()
    current, _ = distinct_tensors(state)
    weights = adapt_weight_names(weights, state)
    fits = fits_outside_heads(state, weights)  # then by name, as in the release
    deeper = 0 if fits else _decoder_depth(current) - _decoder_depth(weights)
    stem, transfer, used = _first_convolution(network), Transfer(), set()
    for name, tensor in current.items():
        origin = _shift_decoder_stage(name, -deeper)
        found = None if origin is None else weights.get(origin)
        if found is not None:
            used.add(origin)
        if SEGMENTATION_LAYERS in f".{name}":
            _transfer_classes(transfer, name, tensor, found, old, new if keeps_classes else UNKNOWN)
        elif found is None:
            if origin is not None and not _is_in_new_block(origin, weights, current):
                raise UnfitWeightsError(f"there is no tensor {origin}")
            transfer.new[name] = "the other network has no such stage or block"
        elif found.shape == tensor.shape:
            transfer.taken.append(name)
            transfer.values[name] = found
        elif name == stem and _differ_only_in_channels(found, tensor):
            transfer.values[name], transfer.adapted[name] = adapt_input_channels(
                found, tensor.shape[1], old.channels, new.channels
            )
        else:
            raise UnfitWeightsError(
                f"{origin} has shape {tuple(found.shape)}, the network needs {tuple(tensor.shape)} for {name}"
            )
    transfer.left_out = [
        name
        for name in distinct_tensors(weights)[0]
        if name not in used and (_shift_decoder_stage(name, deeper) not in state or name in current)
    ]
    return transfer


@torch.no_grad()
def apply_transfer_(network: nn.Module, transfer: Transfer) -> None:
    """Write the weights into the network; further names of a tensor follow."""
    state = network.state_dict()
    for name, values in transfer.values.items():
        state[name].copy_(values)


def adapt_input_channels(
    weight: torch.Tensor, number: int, old: Sequence[str], new: Sequence[str]
) -> tuple[torch.Tensor, str]:
    """Return a first convolution's weight `(features, number, *kernel)`, and in words how it was made.

    Where some channel has the name of an old one, such channels take the weights of that one, and the others start at
    zero: the network begins with its response to the channels that it knows. Otherwise each channel takes the sum of
    the old ones, divided by the new number, so that equal images in all channels give the same output as before.

    Args:
        weight: `(features, channels, *kernel)`.
        old: Names of its channels.
        new: Names of the channels that it shall have.
    """
    common = set(old) & set(new)
    if common and _name_all(old, weight.shape[1]) and _name_all(new, number):
        adapted = weight.new_zeros((weight.shape[0], number, *weight.shape[2:]))
        for index, name in enumerate(new):
            if name in common:
                adapted[:, index] = weight[:, old.index(name)]
        zero = [name for name in new if name not in common]
        how = f"channels {_join(name for name in new if name in common)} as they were"
        return adapted, how + (f", {_join(zero)} from zero" if zero else "")
    adapted = (weight.sum(1, keepdim=True) / number).repeat_interleave(number, dim=1)
    return adapted, f"each of {number} channels is the sum of the {weight.shape[1]} old ones, divided by {number}"


def _transfer_classes(
    transfer: Transfer,
    name: str,
    tensor: torch.Tensor,
    found: torch.Tensor | None,
    old: ChannelsAndClasses,
    new: ChannelsAndClasses,
) -> None:
    """Decide the initial values of a tensor with one row per class."""
    common = [one for one in new.classes if one in old.classes]
    if found is None:
        transfer.new[name] = "the other network has no such output"
    elif not new.classes:
        transfer.new[name] = "layers that output classes start anew"
    elif not _name_all(new.classes, tensor.shape[0]):
        transfer.new[name] = "its outputs are not the classes of the dataset, one by one"
    elif not _name_all(old.classes, found.shape[0]):
        transfer.new[name] = "the names of the old classes are not known"
    elif old.are_regions != new.are_regions:
        transfer.new[name] = "labels and regions are told apart in different ways"
    elif not common:
        transfer.new[name] = "no class has the name of an old one"
    elif found.shape[1:] != tensor.shape[1:]:
        raise UnfitWeightsError(
            f"{name} has {tuple(found.shape[1:])} inputs, the network needs {tuple(tensor.shape[1:])}"
        )
    else:
        values = tensor.detach().clone()
        for row, one in enumerate(new.classes):
            if one in common:
                values[row] = found[old.classes.index(one)]
        transfer.values[name] = values
        if old.classes == new.classes:
            transfer.taken.append(name)
        else:
            fresh = [one for one in new.classes if one not in common]
            transfer.adapted[name] = f"classes {_join(common)} as they were" + (
                f", {_join(fresh)} anew" if fresh else ""
            )


def _is_in_new_block(name: str, old: Iterable[str], new: Iterable[str]) -> bool:
    """Tell whether a tensor belongs to a further entry of a list of which both networks have an earlier one."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if not part.isdigit():
            continue
        siblings = ".".join(parts[:position]) + "."
        if not _has(old, f"{siblings}{part}."):
            earlier = [f"{siblings}{number}." for number in range(int(part))]
            return any(_has(old, one) and _has(new, one) for one in earlier)
    return False


def _has(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _decoder_depth(names: Iterable[str]) -> int:
    """Return the number of a decoder's stages; 0 without a decoder of this kind."""
    matches = filter(None, map(_DECODER_STAGE.fullmatch, names))
    return 1 + max((int(match["number"]) for match in matches), default=-1)


def _shift_decoder_stage(name: str, shift: int) -> str | None:
    """Return a name with the number of its decoder stage shifted; None if there is no such stage."""
    match = _DECODER_STAGE.fullmatch(name)
    if match is None:
        return name
    number = int(match["number"]) + shift
    return f"{match['list']}{number}{match['rest']}" if number >= 0 else None


def _first_convolution(network: nn.Module) -> str | None:
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return f"{name}.weight"
    return None


def _differ_only_in_channels(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.ndim == other.ndim and one.shape[0] == other.shape[0] and one.shape[2:] == other.shape[2:]


def _name_all(names: Sequence[str], number: int) -> bool:
    """Tell whether there is a name of its own for each."""
    return len(names) == number == len(set(names))


def _single(value: int | Sequence[int]) -> int:
    return int(value) if isinstance(value, (int, str)) else int(value[0])


def _join(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
