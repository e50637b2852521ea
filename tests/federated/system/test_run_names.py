"""A federation trains one configuration with several plans: the first have the plain name, the next their own."""

from __future__ import annotations

import pytest
from fake_federation import (
    RUN,
    in_threads,
    make_plans,
    make_registration,
    make_settings,
    make_weights,
    served,
    wait_until,
)

from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.keys import CensusKey, PlansKey, RegistrationKey, RoundKey
from nnunetv2.federated.site.participant import Participant

OTHER = "nnUNetResEncUNetMPlans"
FURTHER = f"{RUN}.{OTHER}"


def registration(plans_name="nnUNetPlans", *, num_cases=3, equal=False):
    return make_registration(num_cases, plans=make_plans(plans_name=plans_name), equal=equal)


def train_through(federation, site, plans_name="nnUNetPlans", *, num_rounds=2, equal=False) -> str:
    """Train as trainers do, from the name that a site knows; return the name of the run that it took part in."""
    with federation.client(site) as client:
        session = Participant(client, site=site, run=RUN)
        session.register(registration(plans_name, equal=equal))
        position = session.start(0, make_weights(1))
        for number in range(position.epoch, num_rounds):
            session.exchange(number, make_weights(number), messages.Update())
        return session.run


def both(federation, plans_name="nnUNetPlans", **options) -> list[str]:
    return in_threads(*(lambda site=site: train_through(federation, site, plans_name, **options) for site in "AB"))


@pytest.mark.parametrize("equal", [False, True])
def test_further_plans_are_a_further_run(tmp_path, equal):
    with served(tmp_path / "federation", make_settings(num_epochs=2)) as federation:
        assert both(federation, equal=equal) == [RUN, RUN]
        assert both(federation, OTHER, equal=equal) == [FURTHER, FURTHER]
        assert both(federation, equal=equal) == [RUN, RUN], "which is over: they get its last average"
        assert both(federation, "third", equal=equal) == [f"{RUN}.third"] * 2
        assert federation.state.registry.runs() == sorted([RUN, FURTHER, f"{RUN}.third"])
        wait_until(lambda: len(federation.state.store.load_events("model")) == 3)
        folders = {path.name for path in (federation.state.store.folder / "models").iterdir() if path.is_dir()}
        assert folders == {f"nnUNetTrainerFake__{name}__3d_fullres" for name in ("nnUNetPlans", OTHER, "third")}


def test_a_run_of_an_earlier_version_goes_on_under_its_plain_name(tmp_path):
    """Whatever its plans are called: the name of the run did not tell."""
    with served(tmp_path / "federation", make_settings(num_epochs=3)) as federation:
        assert both(federation, OTHER, num_rounds=1) == [RUN, RUN]
        assert both(federation, OTHER, num_rounds=3) == [RUN, RUN]
        assert both(federation, "nnUNetPlans", num_rounds=1) == [f"{RUN}.nnUNetPlans"] * 2
        assert both(federation, OTHER, num_rounds=3) == [RUN, RUN]


def test_networks_planned_apart_still_meet_in_one_run(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=2)) as federation:
        names = in_threads(lambda: train_through(federation, "A"), lambda: train_through(federation, "B", OTHER))
        assert names == [RUN, RUN]


def test_where_plans_have_to_be_equal_the_correction_meets_the_others_in_the_same_run(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:

        def wrong(site, name):
            with pytest.raises(RefusedError, match="the plans differ: plans.plans_name is not the same at A and at B"):
                train_through(federation, site, name, equal=True)

        in_threads(lambda: wrong("A", "nnUNetPlans"), lambda: wrong("B", OTHER))
        with federation.client("A") as client:
            assert client.run_state(RUN, plans=OTHER).run == RUN
            client.contribute(RegistrationKey(RUN), registration(OTHER, equal=True))
        names = in_threads(
            lambda: train_through(federation, "A", OTHER, num_rounds=1, equal=True),
            lambda: train_through(federation, "B", OTHER, num_rounds=1, equal=True),
        )
        assert names == [RUN, RUN]


def test_two_trainings_of_a_site_that_wait_for_the_others_do_not_replace_each_other(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:
        with federation.client("A") as client:
            for name, run in (("nnUNetPlans", RUN), (OTHER, FURTHER)):
                found = client.run_state(RUN, plans=name).run
                assert found == run
                client.contribute(RegistrationKey(found), registration(name))
        with federation.client("B") as client:
            session = Participant(client, site="B", run=RUN)
            assert session.register(registration(OTHER)).coverage.keys() == {"A", "B"}
            assert session.run == FURTHER


def test_a_late_site_joins_the_run_that_goes_on(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C"), num_epochs=3)) as federation:
        coordinator = federation.coordinator
        with federation.client("A") as a, federation.client("B") as b:
            for client in (a, b):
                client.contribute(RegistrationKey(RUN), registration())
            coordinator.act(RUN, api.RunAction(action="proceed"), Member("boss", "operator"))
            wait_until(lambda: coordinator.state.registry.is_closed(RegistrationKey(RUN)))
        with federation.client("C") as c:
            assert c.run_state(RUN, plans="nnUNetPlans").run == RUN
            assert c.run_state(RUN, plans=OTHER).run == RUN, "networks may differ"
            assert c.run_state(RUN).run == RUN
        with federation.client("A") as a:
            a.contribute(RegistrationKey(FURTHER), registration(OTHER))
        with federation.client("C") as c:
            assert c.run_state(RUN, plans=OTHER).run == FURTHER, "there is a training with these plans"


def test_names_of_plans_that_are_none_are_refused(tmp_path):
    with served(tmp_path / "federation", make_settings()) as federation, federation.client("A") as client:
        client.contribute(RegistrationKey(RUN), registration())
        for name in ("a/b", "x" * 128, "../.."):
            with pytest.raises(RefusedError, match="cannot be part of a key.*-overwrite_plans_name"):
                client.run_state(RUN, plans=name)
        assert client.run_state(RUN, plans="nnUNetPlans").run == RUN
        with pytest.raises(RefusedError, match="a registration for 3d_fullres.fold_0.nnUNetTrainerFake was sent"):
            client.contribute(RegistrationKey(f"{RUN}.other"), registration())


# ------------------------------------------------------------------------------------- what has changed since is named
def test_what_a_site_has_changed_since_it_registered_is_named(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=2)) as federation:
        both(federation, num_rounds=1)
        changed = make_plans()
        changed["configurations"]["3d_fullres"]["patch_size"] = [16, 32, 16]
        with federation.client("A") as client:
            with pytest.raises(RefusedError, match="num_training_cases was 3 and is 6"):
                client.contribute(RegistrationKey(RUN), registration(num_cases=6))
            with pytest.raises(RefusedError, match=r"plans.configurations.3d_fullres.patch_size\[1\] was 16 and is 32"):
                client.contribute(RegistrationKey(RUN), make_registration(plans=changed))


def test_what_a_site_has_changed_since_it_planned_is_named(tmp_path):
    census = messages.Census(num_cases=5, channel_names={"0": "CT"}, labels={"background": 0, "liver": 1})
    with served(tmp_path / "federation", make_settings()) as federation:

        def plan(site):
            with federation.client(site) as client:
                client.exchange(CensusKey(), census)
                client.exchange(PlansKey("nnUNetPlans"), messages.PlansReport(plans=make_plans()))

        in_threads(lambda: plan("A"), lambda: plan("B"))
        with federation.client("A") as client:
            assert client.contribute(CensusKey(), census).waiting_for == ()
            with pytest.raises(RefusedError, match="num_cases was 5 and is 6") as info:
                client.contribute(CensusKey(), census.model_copy(update={"num_cases": 6}))
            assert info.value.code == "already_closed"
            with pytest.raises(RefusedError, match="plans.colour was absent and is"):
                client.contribute(PlansKey("nnUNetPlans"), messages.PlansReport(plans=make_plans(colour="red")))


# ------------------------------------------------------------------------------------------------- pretrained weights
def with_weights(digest):
    return registration().model_copy(update={"pretrained_weights": digest and digest * 64})


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("1", None, r"\(A: SHA-256 111111111111...; B: none\)"),
        ("1", "2", r"\(A: SHA-256 111111111111...; B: SHA-256 222222222222...\)"),
    ],
)
def test_sites_start_from_the_same_pretrained_weights_or_not_at_all(tmp_path, first, second, said):
    with served(tmp_path / "federation", make_settings(num_epochs=1)) as federation:

        def register(site, message):
            with federation.client(site) as client, pytest.raises(RefusedError, match=said) as info:
                client.exchange(RegistrationKey(RUN), message)
            assert info.value.code == "weights_differ" and "at all sites, or give none anywhere" in str(info.value)

        in_threads(lambda: register("A", with_weights(first)), lambda: register("B", with_weights(second)))
        with federation.client("A") as a, federation.client("B") as b:  # corrected, they go on
            b.contribute(RegistrationKey(RUN), with_weights("1"))
            assert a.exchange(RegistrationKey(RUN), with_weights("1")).message.coverage.keys() == {"A", "B"}
            with pytest.raises(RefusedError, match="pretrained_weights was .* and is absent"):
                a.contribute(RegistrationKey(RUN), with_weights(None))  # the initial weights are still to come


def test_a_training_that_goes_on_needs_no_pretrained_weights_any_more(tmp_path):
    with served(tmp_path / "federation", make_settings(num_epochs=2)) as federation:

        def start(site):
            with federation.client(site) as client:
                session = Participant(client, site=site, run=RUN)
                session.register(with_weights("1"))
                assert session.start(0, make_weights(1)).begins

        in_threads(lambda: start("A"), lambda: start("B"))
        with federation.client("A") as client:
            for digest in ("1", None, "2"):
                session = Participant(client, site="A", run=RUN)
                session.register(with_weights(digest))
                assert not session.start(0, make_weights(1)).begins
            assert client.run_state(RUN).open_round == 0
            client.contribute(RoundKey(RUN, 0), messages.Update(), make_weights(1))
