"""Keep each site's own parts of plans local: network, patch and batch.

Where sites have networks of their own (`--networks own`), all plan from the pooled fingerprint, each for its own GPU:

    the data decide, and all agree     axis order, spacings of 2d and 3d_fullres, normalization, resampling, statistics
    each site decides                  network, patch, batch, and so whether there is a 3d_lowres, and how coarse it is

Sites compare the first part when they have planned. A registration adds network and patch of the configuration
that is trained, which a common model needs; names of plans and planner, batch size and other configurations, which tell
of the GPU too, stay at the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nnunetv2.federated.privacy.plans_redaction import MEDIANS, STATISTICS, WITHHELD, without_extrema
from nnunetv2.federated.protocol.messages import Networks

OWN_PLANS = "own"
"""The name under which plans of such a federation are compared and registered, whatever a site calls them."""
OF_ALL_SITES = ("2d", "3d_fullres")
"""Configurations that are the same at all sites, as far as the data decide."""
OF_PATCH = ("3d_lowres", "3d_cascade_fullres")
"""Configurations whose spacing, or that of the stage before, follows from the patch of a site."""
DECIDED_BY_DATA = ("transpose_forward", "transpose_backward", "label_manager", *STATISTICS, *MEDIANS)
"""Fields of plans."""
DECIDED_BY_DATA_PER_CONFIGURATION = (
    "preprocessor_name",
    "spacing",
    "median_image_size_in_voxels",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
    "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs",
)
KEPT_AT_SITE = ("batch_size", "data_identifier", "inherits_from", "next_stage")
"""Fields of a configuration that is trained which nobody else needs."""
_OF_A_SITE = ("dataset_name", "image_reader_writer")


def plans_to_compare(plans: Mapping[str, Any], networks: Networks) -> dict[str, Any]:
    """Return the part of a site's plans that all compare when they have planned."""
    return dict(plans) if networks == "equal" else data_part(plans, OF_ALL_SITES)


def name_to_compare(plans_name: str, networks: Networks) -> str:
    """Return the name under which all sites meet to compare their plans."""
    return plans_name if networks == "equal" else OWN_PLANS


def data_part(plans: Mapping[str, Any], configurations: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the part of plans that the data decide.

    Args:
        configurations: Of those that the plans have; None: all of them.
    """
    described = _configurations(plans)
    chosen = described if configurations is None else [name for name in configurations if name in described]
    return {
        **_only(plans, DECIDED_BY_DATA),
        "configurations": {
            name: _only(resolve(plans, name), DECIDED_BY_DATA_PER_CONFIGURATION) for name in sorted(chosen)
        },
    }


def data_part_of_training(plans: Mapping[str, Any], configuration: str, networks: Networks) -> dict[str, Any]:
    """Return the part of plans that the data decide for all sites, for one configuration."""
    is_alike = networks == "equal" or configuration in OF_ALL_SITES
    return data_part(without_extrema(plans), [configuration] if is_alike else [])


def plans_to_register(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return the plans to register: agreed part, trained network and patch."""
    trained = resolve(plans, configuration)
    before = trained.get("previous_stage")
    agreed = data_part(plans, {*OF_ALL_SITES, configuration, *([before] if isinstance(before, str) else [])})
    own = {name: value for name, value in trained.items() if name not in KEPT_AT_SITE}
    return {
        **_only(plans, _OF_A_SITE),
        "plans_name": OWN_PLANS,
        **agreed,
        "configurations": {**agreed["configurations"], configuration: own},
        **_only(plans, (WITHHELD,)),
    }


def resolve(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return a configuration with its inherited fields; plans are untrusted."""
    described, seen = _configurations(plans), set()
    merged: dict[str, Any] = {}
    name: Any = configuration
    while isinstance(name, str) and name not in seen and isinstance(described.get(name), Mapping):
        seen.add(name)
        merged = {**described[name], **merged}
        name = described[name].get("inherits_from")
    return merged


def _configurations(plans: Mapping[str, Any]) -> Mapping[str, Any]:
    described = plans.get("configurations")
    return described if isinstance(described, Mapping) else {}


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
