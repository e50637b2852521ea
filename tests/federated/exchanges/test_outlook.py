"""Whether there will be a common model is told when the sites have registered, with whose network or why not."""

from __future__ import annotations

import json

import pytest
from cutter import moved
from fake_federation import (
    ALIASES,
    RUN,
    SHAPES,
    in_threads,
    make_client,
    make_plans,
    make_registration,
    make_settings,
    make_weights,
    served,
    train,
    wait_until,
)
from front_door import FrontDoor, Page

from nnunetv2.federated.aggregation.matching import match_tensors
from nnunetv2.federated.commands import status
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder
from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.outlook import Outlook, counters_of, foresee_model
from nnunetv2.federated.exchanges.steps.registration import match_registrations
from nnunetv2.federated.protocol import api, keys, messages
from nnunetv2.federated.protocol.keys import RegistrationKey
from nnunetv2.federated.protocol.messages import TensorEntry
from nnunetv2.federated.site.participant import Participant

COUNTER = TensorEntry(name="norm.num_batches_tracked", dtype="I64", shape=())
D1, D2 = "1" * 64, "2" * 64


def make_other(*tensors: TensorEntry, **others) -> messages.Registration:
    """Return a registration with further tensors, and with other values of its fields."""
    registration = make_registration()
    return registration.model_copy(update={"tensors": (*registration.tensors, *tensors), **others})


def foresee(first: messages.Registration, *others: messages.Registration) -> Outlook:
    registered = dict(zip("ABC", (first, *others)))
    return foresee_model(registered.items(), match_registrations(registered, make_settings()))


# ------------------------------------------------------------------------------------------------------ what follows
@pytest.mark.parametrize(
    ("trainer", "network_trainer", "expected"),
    [
        ("nnUNetTrainerAsymFedAvg", None, "nnUNetTrainer"),  # of this package, and of any version
        ("nnUNetTrainerFedAvg", None, "nnUNetTrainer"),
        ("nnUNetTrainerOfMine", None, "nnUNetTrainerOfMine"),  # an older site does not say whose network it is
        ("nnUNetTrainerOfMine", "nnUNetTrainerBN", "nnUNetTrainerBN"),
    ],
)
def test_the_model_names_the_trainer_that_built_its_network(trainer, network_trainer, expected):
    registration = make_other(trainer=trainer, network_trainer=network_trainer)
    assert foresee(registration, registration) == Outlook(trainer=expected)


def different_plans(**configuration) -> dict:
    plans = make_plans()
    plans["configurations"]["3d_fullres"].update(configuration)
    return plans


@pytest.mark.parametrize(
    ("other", "obstacle"),
    [
        (
            make_other(plans=different_plans(batch_size=3)),
            "the plans differ: plans.configurations.3d_fullres.batch_size is not the same",
        ),
        (
            make_other(plans=make_plans(configurations={**make_plans()["configurations"], "2d": {"batch_size": 7}})),
            "the plans differ: plans.configurations.2d is not the same",
        ),
        (
            make_other(plans=make_plans(plans_name="nnUNetResEncUNetMPlans")),
            "the plans differ: plans.plans_name is not the same",
        ),
        (
            make_other(network_trainer="nnUNetTrainerBN"),
            "the network of site A is that of nnUNetTrainerFake, the network of site B that of nnUNetTrainerBN",
        ),
        (make_other(architecture=D2), "the networks of sites A and B are made of other modules"),
    ],
)
def test_what_keeps_the_sites_from_one_model_is_named(other, obstacle):
    found = foresee(make_other(architecture=D1), other)
    assert found.trainer == "" and found.obstacle.startswith(obstacle), found.obstacle
    assert "7" not in found.obstacle and "3," not in found.obstacle, "values of plans stay with their sites"


def test_the_third_site_counts_too():
    same = make_registration()
    assert foresee(same, same, make_other(plans=different_plans(batch_size=3))).obstacle.endswith("at A and at C")


def test_sites_that_do_not_describe_their_network_are_taken_at_their_word():
    assert foresee(make_other(architecture=D1), make_other()).obstacle == ""


def test_other_extrema_and_names_of_datasets_do_not_matter():
    statistics = {"0": {"min": -5.0, "max": 9.0, "percentile_00_5": 0.0, "percentile_99_5": 1.0}}
    field = "foreground_intensity_properties_per_channel"
    other = make_plans(dataset_name="Dataset009_Other", **{field: {"0": {**statistics["0"], "max": 8.0}}})
    assert foresee(make_other(plans=make_plans(**{field: statistics})), make_other(plans=other)).obstacle == ""


@pytest.mark.parametrize(
    ("tensor", "obstacle"),
    [
        (COUNTER, ""),
        (
            TensorEntry(name="attention.index", dtype="I64", shape=(4,)),
            "tensor attention.index of the network holds whole numbers, which are not averaged",
        ),
        (
            TensorEntry(name="double.weight", dtype="F64", shape=(4,)),
            "tensor double.weight of the network is not shared by the sites",
        ),
    ],
)
def test_only_counters_need_not_be_shared(tensor, obstacle):
    registration = make_other(tensor)
    assert foresee(registration, registration).obstacle == obstacle


def test_counters_are_known_under_all_their_names():
    registration = make_other(COUNTER, aliases={**ALIASES, "decoder.norm.num_batches_tracked": COUNTER.name})
    assert counters_of(registration) == {COUNTER.name: (), "decoder.norm.num_batches_tracked": ()}
    match = match_tensors({"A": registration.tensors, "B": registration.tensors}, rule="name")
    assert match.shared.keys() == set(SHAPES)


# ------------------------------------------------------------------------------------------------ who is told, and when
def register(federation, registrations) -> dict[str, str]:
    """Let sites register and return what each is told of the model to come."""

    def take_part(site):
        with federation.client(site) as client:
            session = Participant(client, site=site, run=RUN)
            session.register(registrations[site])
            return session.describe_outlook()

    return dict(zip(registrations, in_threads(*(lambda site=site: take_part(site) for site in registrations))))


def read_status(federation, capsys, monkeypatch) -> str:
    monkeypatch.setenv("nnUNet_fed_site", str(federation.state.store.folder / "credential.A.json"))
    monkeypatch.chdir(federation.state.store.folder)
    assert status.main([]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plans", "line"),
    [
        (make_plans(), "here will be a common model, with the network of nnUNetTrainerFake"),
        (
            different_plans(batch_size=3),
            "here will be no common model: the plans differ: "
            "plans.configurations.3d_fullres.batch_size is not the same at A and at B",
        ),
    ],
)
def test_everybody_is_told_when_registration_closes(tmp_path, capsys, monkeypatch, plans, line):
    with served(tmp_path / "federation", make_settings()) as federation:
        told = register(federation, {"A": make_registration(), "B": make_registration(plans=plans)})
        assert told == {"A": f"T{line}", "B": f"T{line}"}
        wait_until(lambda: f"run {RUN}: t{line}" in federation.lines)
        assert OverviewBuilder(federation.coordinator).build().runs[0].model == f"t{line}"
        text = read_status(federation, capsys, monkeypatch)
        assert ("no common model: the plans differ" in text) == ("no common" in line)
        assert "common model" in text


def test_a_site_that_comes_late_with_other_plans_changes_the_outlook(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"))) as federation:
        coordinator = federation.coordinator
        with federation.client("A") as a, federation.client("B") as b:
            for client in (a, b):
                client.contribute(RegistrationKey(RUN), make_registration())
            coordinator.act(RUN, api.RunAction(action="proceed"), Member("boss", "operator"))
            wait_until(lambda: coordinator.state.registry.is_closed(RegistrationKey(RUN)))
            assert a.outlooks().runs == (api.RunOutlook(run=RUN, trainer="nnUNetTrainerFake"),)
            told = register(federation, {"C": make_registration(plans=different_plans(batch_size=3))})
            assert "no common model" in told["C"]
            assert a.outlooks().runs[0].obstacle.endswith("is not the same at A and at C")


def test_before_registration_closes_nothing_is_said(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation, federation.client("A") as client:
        client.contribute(RegistrationKey(RUN), make_registration())
        assert client.outlooks().runs == ()


@pytest.mark.slow
def test_a_coordinator_of_an_older_version_cannot_say(tmp_path):
    unknown = api.Problem(code="unknown_path", message="there is no GET /v1/outlooks here")
    page = Page(404, unknown.model_dump_json().encode(), {"Content-Type": "application/json"})
    with (
        served(tmp_path / "federation", make_settings()) as federation,
        FrontDoor(federation.url, page, times=1000) as door,
        make_client(moved(federation.credential("A"), door.url)) as client,
    ):
        assert "older version" in Participant(client, site="A", run=RUN).describe_outlook()


def test_a_network_with_batch_normalization_becomes_a_model(tmp_path):
    torch = pytest.importorskip("torch")
    registration = make_other(
        COUNTER,
        network_trainer="nnUNetTrainerBN",
        aliases={**ALIASES, "decoder.norm.num_batches_tracked": COUNTER.name},
    )
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:

        def take_part(site):
            with federation.client(site) as client:
                client.exchange(RegistrationKey(RUN), registration)
                client.exchange(keys.InitialKey(RUN), messages.Update(), make_weights(0) if site == "A" else {})
                client.exchange(keys.RoundKey(RUN, 0), messages.Update(), make_weights(1))

        in_threads(lambda: take_part("A"), lambda: take_part("B"))
        wait_until(lambda: federation.state.store.load_events("model"))
        model = federation.state.store.folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres"
        checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainerBN"
    for name in (COUNTER.name, "decoder.norm.num_batches_tracked"):
        assert (checkpoint["network_weights"][name].dtype, checkpoint["network_weights"][name].shape) == (
            torch.int64,
            torch.Size([]),
        )
        assert checkpoint["network_weights"][name] == 0
    assert set(SHAPES) < set(checkpoint["network_weights"])


# ------------------------------------------------------------------------------------------------ versions side by side
def test_a_default_registration_travels_as_before():
    text = make_registration().model_dump_json()
    assert not set(messages.NEW_IN_REGISTRATION) & json.loads(text).keys()
    full = make_other(network_trainer="T", architecture=D1, pretrained_weights=D2)
    assert messages.Registration.model_validate_json(full.model_dump_json()) == full


def test_a_site_may_update_its_software_while_a_run_goes_on(tmp_path):
    with (
        served(tmp_path / "federation", make_settings(num_epochs=2)) as federation,
        federation.client("A") as a,
        federation.client("B") as b,
    ):
        in_threads(lambda: train(a, seed=1, num_rounds=1), lambda: train(b, seed=2, num_rounds=1))
        newer = make_other(network_trainer="nnUNetTrainer", architecture=D1)
        assert a.exchange(RegistrationKey(RUN), newer).message.coverage.keys() == {"A", "B"}
        with pytest.raises(RefusedError, match="num_training_cases was 3 and is 4"):
            a.contribute(RegistrationKey(RUN), newer.model_copy(update={"num_training_cases": 4}))
