"""Decide which tensors of differently planned networks are the same tensor.

Two rules give a tensor the name under which it is compared:

    name         its own name. The published rule; it numbers the decoder from the bottom, so networks of different
                 depth share little of it.
    resolution   as above, but decoder stages are numbered from the top: r0 is the full resolution at every site.

    encoder stage      0  1  2  3  4        0  1  2  3  4  5
    decoder by name    3  2  1  0           4  3  2  1  0
    by resolution      r0 r1 r2 r3          r0 r1 r2 r3 r4

A layer (the weight, bias, ... of one module) is shared whole or not at all, by the sites whose layers agree in the
name, shape and dtype of every tensor; there must be at least two of them, or as many as the federation asks for. Sites
that only receive such a layer do not count. Integer tensors are never shared.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nnunetv2.federated.errors import MatchingError
from nnunetv2.federated.protocol.messages import TensorEntry

Rule = Literal["name", "resolution"]
Manifest = Sequence[TensorEntry]
"""The distinct tensors of one site's network."""
MIN_COVERAGE = 0.1
"""A site that shares a smaller part of its parameters has most likely been set up by mistake."""

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
SHAREABLE = frozenset({"F32", "F16"})
_SUFFIX = "#"
"""Between the common name of a tensor and the label of its group of sites."""
_DECODER = re.compile(r"((?:.*\.)?decoder\.(?:stages|transpconvs|seg_layers)\.)([0-9]+)(\..+)")


# -------------------------------------------------------------------------------------------------- one site's tensors
def normalise_name(name: str) -> str:
    """Return a parameter's name without the parts added by DDP and torch.compile."""
    segments = name.removeprefix("module.").split(".")
    return ".".join(segment for segment in segments if segment != "_orig_mod")


def is_segmentation_layer(name: str) -> bool:
    """Tell whether a tensor is of a layer that outputs classes."""
    return ".seg_layers." in f".{name}"


def distinct_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tell tensors from further names of the same tensor.

    Args:
        state: A state dict: name -> tensor (anything with torch's `data_ptr`, `shape`, `stride` and `dtype`).

    Returns:
        The distinct tensors under the first of their names, and alias -> that name.
    """
    distinct: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        # Tensors without memory (empty, or on the meta device) all have address 0 and alias only themselves.
        place = tensor.data_ptr() or id(tensor)
        identity = (place, tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype))
        first = first_names.setdefault(identity, name)
        if first == name:
            distinct[name] = tensor
        else:
            aliases[name] = first
    return distinct, aliases


def describe_tensors(distinct: Mapping[str, Any]) -> tuple[TensorEntry, ...]:
    """Return the manifest of a site's distinct tensors, which it registers with."""
    return tuple(
        TensorEntry(name=name, dtype=_dtype_name(name, tensor.dtype), shape=tuple(map(int, tensor.shape)))
        for name, tensor in distinct.items()
    )


def count_parameters(manifest: Manifest) -> int:
    """Return the number of floating-point elements."""
    return sum(math.prod(entry.shape) for entry in manifest if entry.dtype in _FLOATING)


def _dtype_name(name: str, dtype: Any) -> Any:
    try:
        return _DTYPES[str(dtype).removeprefix("torch.")]
    except KeyError:
        raise MatchingError(f"tensor {name} has dtype {dtype}, which no federation can share") from None


# -------------------------------------------------------------------------------------------------------- all sites
@dataclass(frozen=True)
class Matching:
    """The tensors that sites share."""

    shared: dict[str, dict[str, str]]
    """Canonical name -> site -> the site's own name; at least so many sites each as were asked for."""
    entries: dict[str, TensorEntry]
    """Canonical name -> dtype and shape, the same at all its sites."""
    coverage: dict[str, tuple[int, int]]
    """Site -> (parameters it shares, parameters it has)."""
    received: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same as `shared`, of sites that only receive these tensors."""


def match_tensors(manifests: Mapping[str, Manifest], *, rule: Rule, min_sites: int = 2) -> Matching:
    """Match the tensors of all sites.

    A match that cannot be meant is refused.

    Args:
        manifests: Site -> its distinct tensors.
        rule: "name" or "resolution".
        min_sites: Tensors that fewer sites have are not shared.

    Raises:
        MatchingError: There are fewer than `min_sites` sites, or some site shares less than `MIN_COVERAGE` of its
            parameters; the message names the likely cause.
    """
    if len(manifests) < min_sites:
        raise MatchingError(
            f"{', '.join(manifests) or 'nobody'} alone shares nothing: a run needs at least {min_sites} sites"
        )
    matching = match_by(rule, manifests, min_sites=min_sites)
    for site, (shared, total) in matching.coverage.items():
        if shared < MIN_COVERAGE * total or shared == 0:
            share = f"{shared} of its {total} parameters ({shared / max(total, 1):.1%})"
            cause = _too_few(site, match_by(rule, manifests), min_sites) or _likely_cause(site, manifests, rule)
            raise MatchingError(f"site {site} shares only {share} with the others. {cause}")
    return matching


def match_by(rule: Rule, manifests: Mapping[str, Manifest], *, min_sites: int = 2) -> Matching:
    """Match tensors whose names are equal by a rule.

    By `resolution`, decoder stages are numbered from the top before. Nothing is refused; see `match_tensors`.
    """
    return _match(manifests, _NAMES[rule], min_sites)


def choose_owners(shared: Mapping[str, Mapping[str, str]], weights: Mapping[str, float]) -> dict[str, str]:
    """Choose per tensor the site whose initial values all start from.

    It is the one with the largest weight.

    So nearly all initial values come from one network, and any order of the sites chooses the same.
    """
    return {name: min(sites, key=lambda site: (-weights[site], site)) for name, sites in shared.items()}


def check_names(shared: Mapping[str, str], manifest: Manifest, *, rule: Rule) -> None:
    """Raise MatchingError unless a site's tensors go by the names that the rule gives them.

    Args:
        shared: Canonical name -> the site's own name.
        manifest: The tensors of the site.
    """
    common = _NAMES[rule](manifest)
    for canonical, local in sorted(shared.items()):
        if canonical.partition(_SUFFIX)[0] != common[local]:
            raise MatchingError(
                f"the coordinator takes tensor {canonical} for {local} of this site, which by the rule {rule} is "
                f"{common[local]}: nothing was sent. Use matching versions; else show this to the coordinating site"
            )


def _own_names(manifest: Manifest) -> dict[str, str]:
    return {entry.name: normalise_name(entry.name) for entry in manifest}


def _names_by_resolution(manifest: Manifest) -> dict[str, str]:
    names = _own_names(manifest)
    stages = _decoder_stages(names.values())
    return {
        local: _DECODER.sub(lambda found: f"{found[1]}r{stages[found[1]] - 1 - int(found[2])}{found[3]}", name)
        for local, name in names.items()
    }


_NAMES: Mapping[Rule, Callable[[Manifest], dict[str, str]]] = {"name": _own_names, "resolution": _names_by_resolution}


def _decoder_stages(names: Iterable[str]) -> dict[str, int]:
    """Return the length of every list of decoder modules, by the beginning of its parameters' names."""
    stages: dict[str, int] = {}
    for name in names:
        if found := _DECODER.fullmatch(name):
            stages[found[1]] = max(stages.get(found[1], 0), int(found[2]) + 1)
    return stages


def _match(
    manifests: Mapping[str, Manifest], name_tensors: Callable[[Manifest], Mapping[str, str]], min_sites: int
) -> Matching:
    """Group, layer by layer, the sites whose layers look the same."""
    layers: dict[str, dict[str, dict[str, TensorEntry]]] = defaultdict(dict)  # layer -> site -> common name -> tensor
    for site in sorted(manifests):
        names = name_tensors(manifests[site])
        for entry in manifests[site]:
            if entry.dtype in _FLOATING:
                common = names[entry.name]
                layers[_layer_of(common)].setdefault(site, {})[common] = entry
    shared: dict[str, dict[str, str]] = {}
    received: dict[str, dict[str, str]] = {}
    entries: dict[str, TensorEntry] = {}
    for layer in sorted(layers):
        groups = _groups_of_sites(layers[layer], min_sites)
        for sites in groups:
            suffix = _suffix(groups, sites, layers[layer])
            receivers = _receivers(layers[layer], sites[0])
            for common, entry in layers[layer][sites[0]].items():
                canonical = common + suffix
                shared[canonical] = {site: layers[layer][site][common].name for site in sites}
                if receivers:
                    received[canonical] = {site: layers[layer][site][common].name for site in receivers}
                entries[canonical] = entry
    return Matching(shared, entries, _coverage(manifests, shared, received, entries), received)


def _layer_of(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    return layer or leaf


def _groups_of_sites(layer: Mapping[str, Mapping[str, TensorEntry]], min_sites: int) -> list[list[str]]:
    """Return the groups, of so many sites at least, whose tensors of this layer agree in every respect."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for site, tensors in layer.items():
        if all(entry.dtype in SHAREABLE and not entry.only_received for entry in tensors.values()):
            groups[_signature(tensors)].append(site)
    return [sites for _, sites in sorted(groups.items()) if len(sites) >= min_sites]


def _receivers(layer: Mapping[str, Mapping[str, TensorEntry]], holder: str) -> list[str]:
    """Return the sites that only receive a layer, and have it as a holder has."""
    wanted = _signature(layer[holder])
    return [
        site
        for site, tensors in layer.items()
        if any(entry.only_received for entry in tensors.values()) and _signature(tensors) == wanted
    ]


def _signature(tensors: Mapping[str, TensorEntry]) -> tuple[tuple[object, ...], ...]:
    """Return all in which the layers of two sites must agree."""
    return tuple(sorted((name, entry.dtype, entry.shape) for name, entry in tensors.items()))


def _suffix(
    groups: Sequence[Sequence[str]], sites: Sequence[str], layer: Mapping[str, Mapping[str, TensorEntry]]
) -> str:
    """Return a group's suffix: the shape of the layer's largest tensor."""
    if len(groups) == 1:
        return ""
    labels = [
        "x".join(map(str, max((entry.shape for entry in layer[group[0]].values()), key=math.prod))) for group in groups
    ]
    number = groups.index(sites)
    label = labels[number] if labels.count(labels[number]) == 1 else f"{labels[number]}.{number}"
    return _SUFFIX + label


def _coverage(
    manifests: Mapping[str, Manifest],
    shared: Mapping[str, Mapping[str, str]],
    received: Mapping[str, Mapping[str, str]],
    entries: Mapping[str, TensorEntry],
) -> dict[str, tuple[int, int]]:
    counts = dict.fromkeys(sorted(manifests), 0)
    for canonical, sites in shared.items():
        for site in (*sites, *received.get(canonical, ())):
            counts[site] += math.prod(entries[canonical].shape)
    return {site: (count, count_parameters(manifests[site])) for site, count in counts.items()}


# ------------------------------------------------------------------------------------------------------------ causes
def _too_few(site: str, with_fewer: Matching, min_sites: int) -> str:
    """Explain that too few sites have a site's layers; else return nothing.

    Args:
        with_fewer: The matching with two sites as the minimum.
    """
    shared, total = with_fewer.coverage[site]
    if shared == 0 or shared < MIN_COVERAGE * total:
        return ""
    return (
        f"What it has in common with others, fewer than {min_sites} sites have, and --min-sites {min_sites} keeps "
        "it from being averaged. Plan with --federated at all sites, so that their networks are the same."
    )


def _likely_cause(site: str, manifests: Mapping[str, Manifest], rule: Rule) -> str:
    """Return the likely cause of a small share, and the remedy."""
    own = _shapes(manifests[site])
    others = {other: _shapes(manifest) for other, manifest in sorted(manifests.items()) if other != site}
    nearest = max(others, key=lambda other: len(own.keys() & others[other].keys()))
    theirs = others[nearest]
    common = own.keys() & theirs.keys()
    if not common:
        return (
            f"None of its tensors has a name that site {nearest} knows ({_first(own)} against {_first(theirs)}): "
            "their network classes differ. Use the same planner and trainer at all sites."
        )
    if _dimensions(own.values()) != _dimensions(theirs.values()):
        return (
            f"Its network has {_dimensions(own.values())}-dimensional weights, that of site {nearest} "
            f"{_dimensions(theirs.values())}-dimensional ones. Train the same configuration at all sites."
        )
    for each in (site, nearest):
        if not {entry.dtype for entry in manifests[each]} & SHAREABLE:
            return f"The weights of site {each} are neither float32 nor float16. Keep its network in float32."
    if rule == "name" and _decoder_stages(own) != _decoder_stages(theirs):
        return (
            f"Its network and that of site {nearest} differ in depth. Start the coordinator with "
            "--matching resolution, or plan with --federated at all sites."
        )
    differing = sorted(name for name in common if own[name] != theirs[name])
    example = f", first in {differing[0]}" if differing else ""  # no shapes: they follow from plans made alone
    return (
        f"Kernels or numbers of features differ from those of site {nearest}{example}. "
        "Plan with --federated at all sites, or use the same planner."
    )


def _shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    return {normalise_name(entry.name): entry.shape for entry in manifest if entry.dtype in _FLOATING}


def _first(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return min(shapes, default="no tensor at all")


def _dimensions(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the largest number of spatial axes of any weight."""
    return max((len(shape) for shape in shapes), default=2) - 2
