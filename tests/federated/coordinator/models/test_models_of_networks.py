"""Plans of common models of networks of their own: nnU-Net reads them, and they tell no site's affairs."""

from __future__ import annotations

import pytest
from fake_federation import make_registration
from tiny_dataset import make_configuration, make_plans

from nnunetv2.federated.coordinator.models.model_folder import plans_of_network
from nnunetv2.federated.privacy.own_networks import plans_to_register
from nnunetv2.plans.plans_manager import PlansManager


def cascade_plans() -> dict:
    lowres = make_configuration(spacing=[2.0] * 3, next_stage="3d_cascade_fullres")
    plans = make_plans(batch_size=77)
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    flat = make_configuration(dims=2, batch_size=77)
    described = {"2d": flat, "3d_lowres": lowres, **plans["configurations"], "3d_cascade_fullres": cascade}
    return {**plans, "plans_name": "nnUNetPlans_6GB", "configurations": described}


@pytest.mark.parametrize("configuration", ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"])
def test_plans_of_a_network_are_plans(configuration):
    own = cascade_plans()
    registration = make_registration(plans=plans_to_register(own, configuration))
    registration = registration.model_copy(update={"configuration": configuration})
    other = make_registration(plans={**registration.plans, "image_reader_writer": "NibabelIO"})
    registered = {"A": registration, "B": other, "C": other}
    plans = plans_of_network(registration, registered, "own_0123456789abcdef")
    manager, before = PlansManager(plans), PlansManager(own)
    assert (
        manager.plans_name == "own_0123456789abcdef" and plans["image_reader_writer"] == "NibabelIO"
    )  # as at most sites
    found, expected = manager.get_configuration(configuration), before.get_configuration(configuration)
    for name in ("patch_size", "spacing", "normalization_schemes", "network_arch_class_name", "previous_stage_name"):
        assert getattr(found, name) == getattr(expected, name), name
    assert (found.batch_size, found.data_identifier) == (2, f"own_0123456789abcdef_{configuration}")
    is_cascade = configuration == "3d_cascade_fullres"
    assert set(plans["configurations"]) == {configuration, *(["3d_lowres"] if is_cascade else [])}
    assert manager.transpose_forward == before.transpose_forward
    assert manager.foreground_intensity_properties_per_channel == before.foreground_intensity_properties_per_channel
