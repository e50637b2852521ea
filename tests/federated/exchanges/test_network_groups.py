"""Where sites have networks of their own: which there are, who has them, and which become common models."""

from __future__ import annotations

import math
import re
import threading

import pytest
from fake_federation import RUN, SHAPES, in_threads, make_registration, make_settings, served, wait_until
from tiny_dataset import make_plans

from nnunetv2.federated.commands import status
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder
from nnunetv2.federated.coordinator.models import model_store
from nnunetv2.federated.coordinator.models.model_store import ModelStore
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.network_groups import describe_network, foresee_networks
from nnunetv2.federated.exchanges.steps.registration import match_registrations
from nnunetv2.federated.privacy.own_networks import plans_to_register
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.site.participant import Participant

DEEPER = {**SHAPES, "encoder.stages.9.weight": (7, 3)}


def make_own(*, deep: bool, stages: int = 0, num_cases: int = 3, **others) -> messages.Registration:
    """Return the registration of a site with a network of its own."""
    plans = plans_to_register(make_plans(stages=stages or (3 if deep else 2)), "3d_fullres")
    registration = make_registration(num_cases, DEEPER if deep else SHAPES, plans=plans)
    return registration.model_copy(update={"trainer": "nnUNetTrainerAsymFedAvg", **others})


def foresee(**registered: messages.Registration):
    settings = make_settings(sites=tuple(registered), networks="own")
    return foresee_networks(registered.items(), match_registrations(registered, settings))


def count(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_a_network_that_is_part_of_a_deeper_one_becomes_a_model_though_a_single_site_has_it():
    found = foresee(A=make_own(deep=False), B=make_own(deep=True))
    deep, shallow = found.networks
    assert (deep.sites, shallow.sites) == (("B",), ("A",))  # the largest first
    assert deep.obstacle == "tensor encoder.stages.9.weight of the network is not shared by the sites"
    assert (shallow.trainer, shallow.obstacle) == ("nnUNetTrainer", "")
    assert (found.trainer, found.obstacle) == ("nnUNetTrainer", "")
    assert deep.name != shallow.name
    assert all(re.fullmatch("own_[0-9a-f]{16}", one.name) for one in found.networks)
    assert str(found) == "the sites have 2 networks; there will be 1 common model"
    text = "\n".join(found.details())
    assert f"site A shares {count(SHAPES):,} of its {count(SHAPES):,} parameters (100.0%)" in text
    assert f"site B shares {count(SHAPES):,} of its {count(DEEPER):,} parameters" in text
    assert f"network {shallow.name} (PlainConvUNet with 2 stages, {count(SHAPES):,} parameters) at A" in text


def test_every_network_that_is_shared_whole_becomes_a_model():
    found = foresee(A=make_own(deep=False), B=make_own(deep=True), C=make_own(deep=True))
    assert [(one.sites, one.obstacle) for one in found.networks] == [(("B", "C"), ""), (("A",), "")]
    assert str(found) == "the sites have 2 networks; there will be 2 common models"


def test_networks_of_the_same_tensors_that_compute_something_else_are_two():
    found = foresee(A=make_own(deep=True), B=make_own(deep=True, stages=4))
    assert [one.sites for one in found.networks] in ([("A",), ("B",)], [("B",), ("A",)])
    assert all(not one.obstacle for one in found.networks)


def test_patches_do_not_tell_networks_apart():
    larger = make_own(deep=True)
    larger.plans["configurations"]["3d_fullres"]["patch_size"] = [64, 64, 64]
    (network,) = foresee(A=make_own(deep=True), B=larger).networks
    assert network.sites == ("A", "B")


def test_what_nobody_can_describe_is_named_by_its_trainer():
    odd = make_own(deep=False, trainer="nnUNetTrainerOfMine")
    assert describe_network(odd) == f"nnUNetTrainerOfMine, {count(SHAPES):,} parameters"
    odd = make_own(deep=False)
    odd.plans["configurations"]["3d_fullres"]["architecture"] = {"network_class_name": "a.\x1b[31m" + "x" * 999}
    assert len(describe_network(odd)) < 200 and "\x1b" not in describe_network(odd)
    odd.plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": "a",
        "arch_kwargs": {"n_stages": 10**399},
    }
    assert len(describe_network(odd)) < 200


def test_a_trainer_that_wants_equal_plans_is_refused_at_once(tmp_path):
    with served(tmp_path / "federation", make_settings(networks="own")) as federation, federation.client("A") as client:
        with pytest.raises(RefusedError, match="wants the same plans at all sites") as info:
            Participant(client, site="A", run=RUN).register(make_own(deep=False, requires_equal_plans=True, **RUN_OF))
        assert "nnUNetTrainerAsymFedAvg" in info.value.remedy


def test_more_of_plans_than_network_and_patch_is_refused_at_once(tmp_path):
    """Nobody compares it, and a common model would carry it to all."""
    with served(tmp_path / "federation", make_settings(networks="own")) as federation, federation.client("A") as client:
        for place in ("", "3d_fullres"):
            talkative = make_own(deep=False, **RUN_OF)
            described = talkative.plans["configurations"][place] if place else talkative.plans
            described["inherits_from" if place else "experiment_planner_used"] = "3d_fullres"
            with pytest.raises(RefusedError, match="registers more of its plans than network and patch"):
                Participant(client, site="A", run=RUN).register(talkative)


def test_an_outlook_is_computed_once_for_all_who_ask(tmp_path, monkeypatch):
    registered = {"A": make_own(deep=False, **RUN_OF), "B": make_own(deep=True, **RUN_OF)}
    with served(tmp_path / "federation", make_settings(networks="own", matching="resolution")) as federation:
        clients = {site: federation.client(site) for site in registered}
        in_threads(
            *(
                lambda site=site: Participant(clients[site], site=site, run=RUN).register(registered[site])
                for site in registered
            )
        )
        calls = []

        def foresee_slowly(registrations, match):
            calls.append(match)
            threading.Event().wait(0.2)  # while the others ask
            return foresee_networks(registrations, match)

        models = ModelStore(federation.state)
        monkeypatch.setattr(model_store, "foresee_networks", foresee_slowly)
        found = in_threads(*[lambda: models.outlook(RUN)] * 8)
        assert len(calls) == 1 and all(one is found[0] for one in found)
        for client in clients.values():
            client.close()


RUN_OF = {"trainer": "nnUNetTrainerFake"}
"""What makes a registration belong to the run of these tests."""


def test_everybody_is_told_of_shares_and_networks_before_the_first_epoch(tmp_path, capsys, monkeypatch):
    registered = {"A": make_own(deep=False, **RUN_OF), "B": make_own(deep=True, **RUN_OF)}
    with served(tmp_path / "federation", make_settings(networks="own", matching="resolution")) as federation:

        def take_part(site):
            with federation.client(site) as client:
                participant = Participant(client, site=site, run=RUN)
                participant.register(registered[site])
                return participant.describe_outlook()

        told = in_threads(*(lambda site=site: take_part(site) for site in registered))
        assert told[0] == told[1]
        assert told[0].startswith("The sites have 2 networks; there will be 1 common model\n  site A shares")
        wait_until(
            lambda: any(
                "at B: there will be no common model of it: tensor encoder.stages.9" in line
                for line in federation.lines
            )
        )
        overview = OverviewBuilder(federation.coordinator).build()
        assert overview.methods == ("Each site has a network of its own; what matches by resolution is averaged",)
        assert overview.runs[0].model == "the sites have 2 networks; there will be 1 common model"
        assert [line.split()[0] for line in overview.runs[0].networks] == ["site", "site", "network", "network"]
        monkeypatch.setenv("nnUNet_fed_site", str(federation.state.store.folder / "credential.A.json"))
        monkeypatch.chdir(federation.state.store.folder)
        assert status.main([]) == 0
        shown = capsys.readouterr().out
        assert "the sites have 2 networks" in shown and "there will be a common model of it" in shown
