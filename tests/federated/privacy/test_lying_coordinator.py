"""Attacks of a coordinator that lies, over real HTTP, and what stops each of them."""

from __future__ import annotations

import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from fake_federation import (
    RUN,
    in_threads,
    make_client,
    make_plans,
    make_weights,
    outcomes_in_threads,
    served,
    wait_until,
)
from hostile_coordinator import hostile, send
from lying_coordinator import Liar, Seeds, cancels, lying
from masked_sites import THREE, MaskedSite, masked_settings, masked_site
from patience import PATIENCE_S

from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.errors import FederationError, MatchingError, NotAllowedError, RefusedError, WireError
from nnunetv2.federated.exchanges.steps import registration
from nnunetv2.federated.exchanges.steps.secure_sum import ConfirmationStep, UploadStep
from nnunetv2.federated.privacy.identities import public_of, roster_number, sign_run_key
from nnunetv2.federated.privacy.plans_redaction import WITHHELD
from nnunetv2.federated.privacy.secure_aggregation import protocol
from nnunetv2.federated.privacy.secure_aggregation.key_agreement import agree, derive_key
from nnunetv2.federated.privacy.secure_aggregation.masking import apply_masks_
from nnunetv2.federated.protocol import api, messages
from nnunetv2.federated.protocol.document import TensorSpec, open_document
from nnunetv2.federated.protocol.keys import (
    AdmissionKey,
    InitialKey,
    RegistrationKey,
    RoundKey,
    SurvivorsKey,
    UploadKey,
    ValidationKey,
    ValidationUploadKey,
)
from nnunetv2.federated.protocol.secure_messages import MaskedUpdate, Survivors
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.federated.site.identity import load_identity, run_key
from nnunetv2.federated.site.outbox import Outbox
from nnunetv2.federated.site.roster import verify

REGISTRATION = RegistrationKey(RUN)


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    for variable in ("nnUNet_fed_trust", "nnUNet_fed_require_secure"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def verified(monkeypatch):
    monkeypatch.setenv("nnUNet_fed_trust", "verified")


@pytest.fixture
def three(tmp_path):
    with lying(tmp_path) as liar:
        yield liar


@pytest.fixture
def five(tmp_path):
    with lying(tmp_path, sites="ABCDE", k=4) as liar:
        yield liar


def sites_of(liar: Liar, names: str) -> dict[str, MaskedSite]:
    return {name: masked_site(liar.federation, name, seed=seed) for seed, name in enumerate(names)}


def outcomes(sites: dict[str, MaskedSite], action) -> dict[str, object]:
    """Let all sites do something at the same time; return what each returns or raises."""
    return dict(
        zip(sites, outcomes_in_threads(*(lambda site=site: action(site) for site in sites.values())), strict=True)
    )


def code_of(outcome: object) -> str:
    return outcome.code if isinstance(outcome, RefusedError) else repr(outcome)


def begin(sites: dict[str, MaskedSite]) -> None:
    """Register all sites, and let them start."""
    found = outcomes(sites, lambda site: (site.register(), site.start()))
    assert not [one for one in found.values() if isinstance(one, BaseException)], found


def play(site: MaskedSite, number: int = 0) -> messages.Aggregate:
    """Let a site take part in a round."""
    weights, aggregate = site.round(number, site.position.weights)
    site.position = replace(site.position, weights=weights, epoch=number + 1)
    return aggregate


def verify_at(liar: Liar, *names: str) -> None:
    """Let people at sites confirm the roster as it is now."""
    roster = liar.federation.coordinator.roster().sites
    for name in names:
        credential = liar.federation.credential(name)
        number = roster_number(credential.federation, roster)
        verify(roster, number, credential, liar.federation.credential_file(name))


def nothing_masked_was_sent(liar: Liar, site: str, number: int = 0) -> bool:
    return site not in liar.received(UploadKey(RUN, number))


# ------------------------------------------------------------------------------------------------ keys and identities
def told_keys(**forged):
    """Return a lie about the keys in a match."""

    def lie(site, match, tensors):
        return (match.model_copy(update={"keys": {**match.keys, **forged}}), tensors) if site == "A" else None

    return lie


def test_a_swapped_run_key_is_refused(three):
    sites = sites_of(three, "ABC")

    def lie(site, match, tensors):
        swapped = match.keys["B"].model_copy(update={"exchange_key": public_of(X25519PrivateKey.generate())})
        return told_keys(B=swapped)(site, match, tensors)

    three.about(REGISTRATION, lie)
    found = outcomes(sites, lambda site: site.register())
    assert code_of(found["A"]) == "run_key_forged" and "for site B" in str(found["A"])
    assert nothing_masked_was_sent(three, "A")


def own_key_of(liar: Liar, place: str):
    """Return a run key of the coordinator's own, with an identity of its own."""
    identity, key = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
    federation = liar.federation.coordinator.settings.federation
    return sign_run_key(identity, key, federation=federation, gathering=place)


def test_a_swapped_identity_is_refused_once_the_right_one_was_seen(three):
    sites = sites_of(three, "ABC")
    begin(sites)
    three.about(REGISTRATION, told_keys(B=own_key_of(three, str(REGISTRATION))))
    with pytest.raises(RefusedError, match="site B has another identity") as info:
        masked_site(three.federation, "A", seed=0).register()
    assert info.value.code == "identity_changed"


def test_an_identity_that_was_swapped_from_the_beginning_is_refused_where_people_have_compared(three, verified):
    sites = sites_of(three, "ABC")
    for name in "ABC":
        three.federation.credential(name)
    verify_at(three, "A", "B", "C")
    three.about(REGISTRATION, told_keys(B=own_key_of(three, str(REGISTRATION))))
    found = outcomes(sites, lambda site: site.register())
    assert code_of(found["A"]) == "identity_changed"
    assert nothing_masked_was_sent(three, "A")


def test_without_that_look_of_people_every_log_says_what_it_does_not_protect_from(three):
    sites = sites_of(three, "ABC")
    begin(sites)
    for site in sites.values():
        assert any(
            "not verified by people" in line and "a coordinator that invents sites" in line for line in site.lines
        )


def test_an_identity_in_place_of_the_site_s_own_is_refused(three):
    sites = sites_of(three, "ABC")
    three.about(REGISTRATION, told_keys(A=own_key_of(three, str(REGISTRATION))))
    found = outcomes(sites, lambda site: site.register())
    assert code_of(found["A"]) == "identity_changed" and "for this site, A" in str(found["A"])


@pytest.mark.slow
def test_a_fake_site_is_refused_where_people_have_compared(tmp_path, verified):
    """The coordinator invites a site of its own after the number was compared."""
    with lying(tmp_path, sites="ABC") as liar:
        for name in "ABC":
            liar.federation.credential(name)
        verify_at(liar, "A", "B", "C")
        liar.federation.coordinator.invite("Z", "site", by="liar")
        sites = sites_of(liar, "ABCZ")
        verify_at(liar, "Z")
        found = outcomes(sites, lambda site: site.register())
        assert {code_of(found[name]) for name in "ABC"} == {"roster_unverified"}
        assert "identity of Z (nnUNet_fed_trust=verified)" in str(found["A"])
        assert all(nothing_masked_was_sent(liar, name) for name in "ABC")
        verify_at(liar, "A", "B", "C")
        begin(sites_of(liar, "ABCZ"))


def test_a_key_of_another_run_is_refused(three):
    """Whose masks the coordinator could know, if that run was with sites of its own."""
    identity = load_identity(three.federation.credential_file("B")) if three.federation.credential("B") else None
    elsewhere = sign_run_key(
        identity, X25519PrivateKey.generate(), federation="test", gathering="runs/another/registration"
    )
    sites = sites_of(three, "ABC")
    three.about(REGISTRATION, told_keys(B=elsewhere))
    assert code_of(outcomes(sites, lambda site: site.register())["A"]) == "run_key_forged"


@pytest.mark.slow
def test_a_swapped_run_key_of_a_site_that_comes_late_is_refused(tmp_path):
    with lying(tmp_path, sites="ABCD") as liar:
        sites = sites_of(liar, "ABC")
        operator, registry = Member("boss", "operator"), liar.federation.state.registry

        def proceed() -> None:
            wait_until(lambda: len(liar.received(REGISTRATION)) == 3)
            liar.federation.coordinator.act(RUN, api.RunAction(action="proceed"), operator)

        in_threads(*(lambda site=site: site.register() for site in sites.values()), proceed)
        outcomes(sites, lambda site: site.start())
        late = masked_site(liar.federation, "D", seed=3)
        late.join()
        outcomes(sites, play)
        assert registry.cohort(RUN, 1) == frozenset("ABCD")
        late.start()

        def lie(site, admitted, tensors):
            swapped = admitted.keys["D"].model_copy(update={"exchange_key": public_of(X25519PrivateKey.generate())})
            return admitted.model_copy(update={"keys": {**admitted.keys, "D": swapped}}), tensors

        liar.about(AdmissionKey(RUN, "D"), lie)
        found = outcomes({"A": sites["A"]}, lambda site: play(site, 1))
        assert code_of(found["A"]) == "run_key_forged" and "for site D" in str(found["A"])
        assert nothing_masked_was_sent(liar, "A", 1)


# ---------------------------------------------------------------------------------------------------- names of tensors
@pytest.mark.parametrize("told", ["ABC", "BC"], ids=["everybody", "them alone"])
def test_sites_that_are_to_take_one_tensor_for_another_refuse(three, told):
    """A factor of 0 in the place of a summand lets networks learn nothing: a sum would be that of the one site left."""
    shapes = {"encoder.weight": (4, 3), "norm.weight": (4,), "norm.bias": (4,)}
    sites = {name: masked_site(three.federation, name, seed=seed, shapes=shapes) for seed, name in enumerate("ABC")}

    def lie(site, match, tensors):
        shared = {name: dict(of) for name, of in match.shared.items()}
        for victim in "BC":
            shared["norm.weight"][victim], shared["norm.bias"][victim] = "norm.bias", "norm.weight"
        return (match.model_copy(update={"shared": shared}), tensors) if site in told else None

    three.about(REGISTRATION, lie)
    found = outcomes(sites, lambda site: site.register())
    for name in "BC":
        assert isinstance(found[name], MatchingError), found
        assert "takes tensor norm.bias for norm.weight of this site" in str(found[name])
    assert all(nothing_masked_was_sent(three, name) for name in "ABC")


# ------------------------------------------------------------------------------------------------------------ settings
@contextmanager
def settings_of_a_liar(**changes):
    """Serve settings that are not those with which sites have joined, and count what else is asked for."""
    settings = masked_settings(THREE).model_copy(update=changes)
    asked: list[str] = []

    def answer(handler) -> None:
        asked.append(f"{handler.command} {handler.path}")
        state = api.RunState(run=RUN)
        send(handler, encode_json(settings if handler.path == "/v1/settings" else state))

    with hostile(answer) as credential:
        yield replace(credential, federation="test", secure=3), asked


def test_a_federation_that_goes_back_to_clear_updates_gets_nothing_from_who_has_joined_a_secure_one(tmp_path):
    with settings_of_a_liar(secure=None) as (credential, asked), make_client(credential) as client:
        site = MaskedSite(client, credential, tmp_path / "site.json", seed=0)
        with pytest.raises(
            NotAllowedError, match=r"sums in clear, and this site requires secure sums of 3 .*when it joined"
        ):
            site.register()
        assert all(request.startswith("GET ") for request in asked)


@pytest.mark.parametrize("required", ["4", "64"])
def test_a_site_s_own_requirement_is_kept_whatever_held_when_it_joined(tmp_path, monkeypatch, required):
    monkeypatch.setenv("nnUNet_fed_require_secure", required)
    with settings_of_a_liar() as (credential, asked), make_client(credential) as client:
        site = MaskedSite(client, credential, tmp_path / "site.json", seed=0)
        with pytest.raises(NotAllowedError, match=f"from 3 sites on, and this site requires secure sums of {required}"):
            site.register()
        assert all(request.startswith("GET ") for request in asked)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (RoundKey(RUN, 0), messages.Update()),
        (ValidationKey(RUN, 0), messages.Validation(tp=(1.0,), fp=(1.0,), fn=(1.0,))),
    ],
    ids=["update", "validation"],
)
def test_no_way_of_the_software_sends_an_update_in_clear(key, message):
    """Whatever else goes wrong: the one place where documents leave refuses it."""
    with settings_of_a_liar(secure=None) as (credential, asked), make_client(credential) as client:
        with pytest.raises(NotAllowedError, match="would leave in clear"):
            client.exchange(key, message, make_weights(0))
        assert asked == []


# ----------------------------------------------------------------------------------------------------------- survivors
def told_survivors(change, *, only: str = "ABCDE"):
    """Return a lie about survivors: lane -> sites is changed by a function."""

    def lie(site, message, tensors):
        if site not in only or not isinstance(message, Survivors):
            return None
        return message.model_copy(
            update={"sent": {lane: change(sites) for lane, sites in message.sent.items()}}
        ), tensors

    return lie


def no_shares_were_given(liar: Liar, number: int = 0) -> bool:
    return not liar.received(RoundKey(RUN, number))


def alone_or_with_a(site: str):
    return lambda sites: tuple(sorted({"A", site}))


def without(*names: str):
    return lambda sites: tuple(site for site in sites if site not in names)


def play_against(liar: Liar, sites: dict[str, MaskedSite], number: int = 0) -> dict[str, str]:
    """Let sites take part in a round; return the code with which each refuses."""
    return {name: code_of(found) for name, found in outcomes(sites, lambda site: play(site, number)).items()}


def test_a_view_with_fewer_than_k_sites_is_refused(five):
    """As after settings were changed to a quorum of 1: what counts is what held when the site registered."""
    sites = sites_of(five, "ABCDE")
    begin(sites)
    five.about(UploadKey(RUN, 0), lambda site, *answer: told_survivors(alone_or_with_a(site))(site, *answer))
    assert set(play_against(five, sites).values()) == {"survivors_implausible"}
    assert no_shares_were_given(five)


def test_a_quorum_of_one_is_refused_by_the_coordinator_and_if_it_lies_by_the_sites(five, monkeypatch):
    coordinator = five.federation.coordinator
    with pytest.raises(FederationError, match="--quorum 1 is less than"):
        coordinator.change_settings(api.SettingsChange(quorum=1, deadline_s=0.05), by="liar")
    sites = sites_of(five, "ABCDE")
    begin(sites)
    forced = coordinator.settings.model_copy(update={"quorum": 1, "deadline_s": 0.05, "min_sites": 2})
    monkeypatch.setattr(UploadStep, "floor", lambda *_: 1)
    coordinator.state._use_settings(forced)
    found = outcomes({"A": sites["A"]}, play)
    assert code_of(found["A"]) == "survivors_implausible" and "names A as the sites" in str(found["A"])
    assert no_shares_were_given(five)


def test_a_lane_that_is_shrunk_alone_is_refused(five, credulous):
    """So that the sum of the weights would have k sites although t took part."""
    sites = sites_of(five, "ABCDE")
    begin(sites)

    def lie(site, message, tensors):
        if not isinstance(message, Survivors):
            return None
        weights = next(lane for lane in message.sent if len(lane) == 16)
        return message.model_copy(update={"sent": {**message.sent, weights: ("A", "B", "C", "D")}}), tensors

    five.about(UploadKey(RUN, 0), lie)
    assert set(play_against(five, sites).values()) == {"survivors_implausible"}
    assert no_shares_were_given(five)


def test_a_lane_that_is_named_for_another_one_is_refused(five, credulous):
    """The shares of one lane's seeds would be given as those of the other, and both seeds of one vector be known."""
    sites = sites_of(five, "ABCDE")
    begin(sites)

    def lie(site, message, tensors):
        if not isinstance(message, Survivors):
            return None
        sent = dict(message.sent)
        sent["earlier"] = sent.pop("training")
        return message.model_copy(update={"sent": sent}), tensors

    five.about(UploadKey(RUN, 0), lie)
    assert set(play_against(five, sites).values()) == {"survivors_implausible"}
    assert no_shares_were_given(five)


def test_survivors_that_do_not_name_the_site_or_that_nobody_knows_are_refused(five):
    sites = sites_of(five, "ABCDE")
    begin(sites)
    five.about(UploadKey(RUN, 0), told_survivors(lambda sites: (*sites, "Z")))
    assert set(play_against(five, sites).values()) == {"survivors_implausible"}
    assert no_shares_were_given(five)


@pytest.fixture
def credulous(monkeypatch):
    """Let the coordinator accept confirmations of whatever it has told."""
    monkeypatch.setattr(ConfirmationStep, "check", lambda *_: None)


def test_two_sets_of_survivors_to_two_halves_are_confirmed_by_too_few(five, credulous):
    """E alone is left out of one view, so that its pair seeds and its own seed would both be given."""
    sites = sites_of(five, "ABCDE")
    begin(sites)
    five.about(UploadKey(RUN, 0), told_survivors(without("E"), only="AB"))
    found = play_against(five, sites)
    assert set(found.values()) == {"survivors_unconfirmed"}
    assert no_shares_were_given(five)


def test_a_second_set_of_survivors_to_one_site_is_refused_also_after_a_restart(five, credulous):
    sites = sites_of(five, "ABCDE")
    begin(sites)
    five.about(UploadKey(RUN, 0), told_survivors(without("E"), only="AB"))
    assert set(play_against(five, sites).values()) == {"survivors_unconfirmed"}
    five.stop(UploadKey(RUN, 0))
    again = sites_of(five, "AB")
    found = outcomes(again, come_back)
    assert {code_of(one) for one in found.values()} == {"second_set"}
    assert "A SECOND SET OF SURVIVORS" in str(found["A"])
    assert no_shares_were_given(five) or set(five.received(RoundKey(RUN, 0))) <= set("CDE")


@pytest.mark.parametrize("replayed", ["survivors and signatures", "signatures"])
def test_replayed_survivors_of_another_round_are_refused(three, credulous, replayed):
    sites = sites_of(three, "ABC")
    begin(sites)
    kept: dict[str, tuple] = {}

    def keep(site, message, tensors):
        kept.setdefault(site, (message, tensors))

    three.about(UploadKey(RUN, 0), keep)
    signatures: dict[str, tuple] = {}
    three.about(SurvivorsKey(RUN, 0), lambda site, *answer: signatures.setdefault(site, answer) and None)
    outcomes(sites, play)
    assert kept.keys() == signatures.keys() == set("ABC")
    if replayed != "signatures":
        three.about(UploadKey(RUN, 1), lambda site, *_: kept[site])
    three.about(SurvivorsKey(RUN, 1), lambda site, *_: signatures[site])
    found = outcomes(sites, lambda site: play(site, 1))
    expected = "survivors_unconfirmed" if replayed == "signatures" else "survivors_implausible"  # other lanes were sent
    assert {code_of(one) for one in found.values()} == {expected}
    assert no_shares_were_given(three, 1)


# ------------------------------------------------------------------------------------------------ weights of the start
def other_weights(site, message, tensors):
    """Send site A other weights than the others, by a hair."""
    if site != "A":
        return None
    return message, {name: values * np.float32(1.0000002) for name, values in tensors.items()}


def test_different_weights_to_two_sites_are_noticed_when_masked_updates_arrive(three):
    sites = sites_of(three, "ABC")
    three.about(InitialKey(RUN), other_weights)
    begin(sites)
    assert "bound to another cohort, or to other weights" in str(outcomes({"A": sites["A"]}, play)["A"])


@pytest.fixture
def takes_anything(monkeypatch):
    """Let the coordinator accept masked documents whatever they are bound to."""
    monkeypatch.setattr(UploadStep, "check", lambda *_: None)


def stop_when_all_have_sent(liar: Liar, sites: dict[str, MaskedSite], key, action) -> None:
    """Let sites do something that has no end, until all masked documents are there."""

    def stop() -> None:
        wait_until(lambda: len(liar.received(key)) == len(sites))
        for site in sites.values():
            site.participant.transport.close()

    outcomes_in_threads(*(lambda site=site: action(site) for site in sites.values()), stop)


@pytest.mark.slow
@pytest.mark.parametrize("is_lie", [False, True])
def test_different_weights_to_two_sites_leave_no_sum_of_anything(three, monkeypatch, takes_anything, is_lie):
    """Neither of weights nor of losses, Dice and distances: from these, too, it shows how one site reacts."""
    seeds, sites = Seeds(monkeypatch), sites_of(three, "ABC")
    if is_lie:
        three.about(InitialKey(RUN), other_weights)
    begin(sites)
    stop_when_all_have_sent(three, sites, UploadKey(RUN, 0), play)
    sums = seeds.sums(three, UploadKey(RUN, 0))
    assert len(sums) >= 3
    assert {cancels(words) for words in sums.values()} == {not is_lie}, sums


@pytest.mark.parametrize("is_lie", [False, True])
def test_what_is_told_of_other_sites_to_one_alone_leaves_no_sum_of_how_far_they_moved(
    three, monkeypatch, takes_anything, is_lie
):
    """Else a smaller and smaller distance, told to one site, finds out how far it moves."""
    seeds, sites = Seeds(monkeypatch), sites_of(three, "ABC")
    if is_lie:

        def lie(site, message, tensors):
            begin = message.next_round.model_copy(update={"typical_change": 1e-9})
            return (message.model_copy(update={"next_round": begin}), tensors) if site == "A" else None

        three.about(InitialKey(RUN), lie)
    begin(sites)
    stop_when_all_have_sent(three, sites, UploadKey(RUN, 0), play)
    assert cancels(seeds.sums(three, UploadKey(RUN, 0))["changes"]) is not is_lie


def test_another_scale_that_is_told_to_one_site_alone_leaves_no_sum_of_anything(three, monkeypatch, takes_anything):
    """Else its weights could be made so small that the sum would be that of the others."""
    seeds, sites = Seeds(monkeypatch), sites_of(three, "ABC")

    def lie(site, message, tensors):
        begin = message.next_round.model_copy(update={"weight_bits": 20})
        return (message.model_copy(update={"next_round": begin}), tensors) if site == "A" else None

    three.about(InitialKey(RUN), lie)
    begin(sites)
    stop_when_all_have_sent(three, sites, UploadKey(RUN, 0), play)
    sums = seeds.sums(three, UploadKey(RUN, 0))
    assert len(sums) >= 3 and not any(cancels(words) for words in sums.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"weighting": "uniform"}, {"num_iterations_per_epoch": 1}, {"proximal": 1e9}, {"keep_local": "*"}],
    ids=lambda one: next(iter(one)),
)
def test_sites_that_are_told_to_do_or_count_next_to_nothing_leave_no_sum_of_the_other_one(
    three, monkeypatch, takes_anything, change
):
    seeds, sites = Seeds(monkeypatch), sites_of(three, "ABC")
    for site in "BC":
        sites[site].participant.settings = three.federation.coordinator.settings.model_copy(update=change)
    begin(sites)
    stop_when_all_have_sent(three, sites, UploadKey(RUN, 0), play)
    assert not any(cancels(words) for words in seeds.sums(three, UploadKey(RUN, 0)).values())


def test_sites_that_were_told_to_prepare_their_scans_in_another_way_leave_no_sum_of_the_other_one(
    three, monkeypatch, takes_anything
):
    """As with a standard deviation so large that their networks see nothing."""
    monkeypatch.setattr(registration, "check_planned_alike", lambda *_: None)
    seeds, sites = Seeds(monkeypatch), sites_of(three, "ABC")
    for site in "BC":
        statistics = {"foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1e9}}}
        told = sites[site].registration
        sites[site].registration = told.model_copy(update={"plans": {**told.plans, **statistics}})
    begin(sites)
    stop_when_all_have_sent(three, sites, UploadKey(RUN, 0), play)
    assert not any(cancels(words) for words in seeds.sums(three, UploadKey(RUN, 0)).values())


@pytest.mark.slow
@pytest.mark.parametrize("is_lie", [False, True])
def test_different_averages_to_validate_leave_no_sum_of_counts(tmp_path, monkeypatch, takes_anything, is_lie):
    with lying(tmp_path, validate_every=1) as liar:
        seeds, sites = Seeds(monkeypatch), sites_of(liar, "ABC")
        begin(sites)
        if is_lie:
            liar.about(RoundKey(RUN, 0), other_weights)
        aggregates = outcomes(sites, play)
        for name, site in sites.items():
            assert site.validate(aggregates[name], is_last=False) is None
        sums = seeds.sums(liar, ValidationUploadKey(RUN, 0))
        assert sums.keys() == {"counts", "loss"}
        assert {cancels(words) for words in sums.values()} == {not is_lie}


# ------------------------------------------------------------------------------------------------- what sites compare
def only_received(match):
    """Say that A alone trains the head, and the others receive it."""
    shared = {**match.shared, "head.weight": {"A": "head.weight"}}
    received = {"head.weight": {site: "head.weight" for site in match.shared["head.weight"] if site != "A"}}
    return match.model_copy(
        update={"shared": shared, "received": received, "initial_owner": {**match.initial_owner, "head.weight": "A"}}
    )


def of_one_site_each(match):
    """Say that the heads of the sites are different tensors."""
    shared, owners = dict(match.shared), dict(match.initial_owner)
    owners.pop("head.weight")
    for number, site in enumerate(shared.pop("head.weight")):
        shared[f"head.weight#{number}"], owners[f"head.weight#{number}"] = {site: "head.weight"}, site
    return match.model_copy(update={"shared": shared, "initial_owner": owners})


@pytest.mark.parametrize("lie", [only_received, of_one_site_each])
def test_a_tensor_that_is_kept_from_comparison_is_refused(three, lie):
    """With dead values of it, the updates of the others would be known, and the sum be that of one site."""
    sites = sites_of(three, "ABC")
    three.about(REGISTRATION, lambda site, match, tensors: (lie(match), tensors))
    found = outcomes(sites, lambda site: site.register())
    assert code_of(found["A"]) == "sum_too_small"
    assert all("head.weight" in str(one) and isinstance(one, WireError | RefusedError) for one in found.values()), found


@pytest.mark.parametrize("planned", ["alone", "together"])
def test_networks_that_differ_are_refused_where_they_are_to_be_the_same(tmp_path, planned):
    """B, C and D have a layer more: bad values of it, sent by a liar, would leave A alone in the sum."""
    shapes = {"encoder.weight": (40, 30), "head.weight": (2, 4)}
    deeper = {**shapes, "decoder.weight": (5, 5)}
    with lying(tmp_path, sites="ABCD") as liar:
        sites = {
            name: masked_site(
                liar.federation,
                name,
                seed=seed,
                shapes=shapes if name == "A" else deeper,
                plans=make_plans(**({WITHHELD: True} if planned == "alone" else {})),
            )
            for seed, name in enumerate("ABCD")
        }
        begin(sites)
        found = outcomes(sites, play)
        if planned == "together":
            assert {code_of(one) for one in found.values()} == {"networks_differ"}
            assert all(nothing_masked_was_sent(liar, name) for name in "ABCD")
        else:
            assert all(set(one.contributors) == set("ABCD") for one in found.values()), found
            assert all(any("Beware" in line and "A lack" in line for line in site.lines) for site in sites.values())


def test_a_site_that_is_said_to_annotate_what_it_does_not_is_not_counted_for_it(three):
    """Counts of a class that one site annotates would be that site's, with zeros of the others."""
    sites = sites_of(three, "ABC")
    told = {"annotated": dict.fromkeys("ABC", (1, 2))}
    three.about(REGISTRATION, lambda site, match, tensors: (match.model_copy(update=told), tensors))
    found = outcomes(sites, lambda site: site.register())
    assert all(isinstance(one, WireError) and "annotates" in str(one) for one in found.values()), found


# ------------------------------------------------------------------------------------------------- the same round twice
@pytest.mark.slow
def test_a_second_round_of_the_same_number_gets_nothing(tmp_path):
    """The coordinator goes back to a backup and asks for round 0 once more, from sites that have other weights now."""
    settings, folder = masked_settings(THREE, validate_every=0), tmp_path / "federation"
    with served(folder, settings) as federation:
        sites = {name: masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)}
        begin(sites)
        credentials = {name: federation.credential(name) for name in THREE}
        files = {name: federation.credential_file(name) for name in THREE}
    shutil.copytree(folder, tmp_path / "backup")
    with served(folder, settings) as federation:
        sites = {name: returning(federation, credentials[name], files[name]) for name in THREE}
        ends = outcomes(sites, come_back)
        assert all(isinstance(one, messages.Aggregate) for one in ends.values()), ends
    with served(tmp_path / "backup", settings) as federation:
        sites = {name: returning(federation, credentials[name], files[name], change=1.0) for name in THREE}

        def stop() -> None:
            wait_until(lambda: all("does not answer a second time" in "".join(one.lines) for one in sites.values()))
            federation.coordinator.act(RUN, api.RunAction(action="stop"), Member("boss", "operator"))

        *ends, _ = outcomes_in_threads(*(lambda site=site: come_back(site) for site in sites.values()), stop)
        assert {code_of(one) for one in ends} == {"run_stopped"}
        assert federation.state.registry.get(UploadKey(RUN, 0)) is None


def returning(federation, credential, file, *, change: float = 0.0) -> MaskedSite:
    """Return a site that was there before, with its files."""
    client = make_client(replace(credential, url=federation.url))
    return MaskedSite(client, credential, file, seed=ord(credential.site) % 65, trained=lambda number: change)


def come_back(site: MaskedSite) -> messages.Aggregate:
    site.register()
    site.start()
    return play(site)


# ----------------------------------------------------------------------------------------------------- what it has kept
@pytest.mark.slow
def test_an_upload_that_came_too_late_stays_unreadable_even_with_all_other_sites_keys(tmp_path, monkeypatch):
    """The coordinator keeps E's upload, and all other sites give it the keys with which they mask."""
    own_seeds: dict[tuple[str, str], bytes] = {}
    share_keys = protocol.share_keys

    def sharing(cohort, site, private_key, lanes, common):
        shared = share_keys(cohort, site, private_key, lanes, common)
        if site == "E":
            own_seeds.update({(lane, one): seed for (lane, one), seed in shared.seeds.items() if one == "E"})
        return shared

    monkeypatch.setattr(protocol, "share_keys", sharing)
    with lying(tmp_path, sites="ABCDE") as liar:
        sites = sites_of(liar, "ABCDE")
        begin(sites)
        liar.federation.coordinator.change_settings(api.SettingsChange(quorum=4, deadline_s=0.05), by="boss")
        plan = sites["E"].participant._masked._plan(RoundKey(RUN, 0))
        lane = next(one for one in plan.sum.lanes if len(one.name) == 16)
        plain = plain_words(sites["E"], plan, lane)
        kept = tmp_path / "kept.safetensors"
        honest = liar.federation.coordinator.contribute

        is_kept = threading.Event()

        def hold_back(key, site, incoming, digest, size):
            if key == str(UploadKey(RUN, 0)):
                if site == "E":
                    shutil.copy(incoming, kept)
                    is_kept.set()
                    raise OSError("lost on the way")
                assert is_kept.wait(PATIENCE_S)  # the upload has come before the round closes without it
            return honest(key, site, incoming, digest, size)

        liar.federation.coordinator.contribute = hold_back
        found = outcomes(sites, play)
        assert all(set(one.contributors) == set("ABCD") for one in found.values()), found
        words = without_pair_masks(kept, plan.sum, lane, liar)
        assert not (words[4:] == plain).any() and words[0] != 1 and words[2] != 0 and words[3] != 0
        apply_masks_(words, plus=[], minus=[own_seeds[lane.name, "E"]])  # which never left E's machine but in shares
        assert (words[4:] == plain).all() and list(words[:4]) == [1, sites["E"].registration.num_training_cases, 0, 0]


def without_pair_masks(path, found, lane, liar: Liar) -> np.ndarray:
    """Take off every mask that E has in common with another site, as those sites' keys allow."""
    cohort, common = found.cohort, found.common("E")
    with open_document(path) as document:
        words = np.array(document.read(f"masked.{lane.name}"))
    for other in "ABCD":
        private, _ = run_key("test", str(REGISTRATION), liar.federation.credential_file(other))
        secret = agree(private.private_bytes_raw(), cohort.run_keys["E"])
        seed = derive_key(secret, b"pair seed", lane.context(cohort), common[other])
        apply_masks_(words, plus=[seed], minus=[])  # E comes after all others, so it has subtracted them
    return words


def plain_words(site: MaskedSite, plan, lane) -> np.ndarray:
    """Return the numbers that a site masks in round 0."""
    words = np.empty(lane.size, np.uint32)
    trained = site.epoch(0, site.position.weights)
    masked = site.participant._masked
    masked._numbers(plan, {name: trained[name] for name in masked._specs}, messages.Update())[lane.name](words)
    return words


def test_two_processes_of_one_site_answer_for_one_set_of_survivors_together(tmp_path):
    """As where the coordinator takes two folds for one run, or somebody starts a training twice."""
    first, second = Outbox(tmp_path), Outbox(tmp_path)
    first.promise_survivors("runs/r/survivors/0", "a" * 64)
    second.promise_survivors("runs/r/survivors/0", "a" * 64)
    with pytest.raises(RefusedError, match="A SECOND SET"):
        second.promise_survivors("runs/r/survivors/0", "b" * 64)


def test_two_processes_of_one_site_send_one_masked_document(tmp_path):
    message = MaskedUpdate(lanes={"w": "a" * 64})
    words = [np.full(3, number, np.uint32) for number in range(2)]
    boxes = [Outbox(tmp_path) for _ in words]

    def put(box, one):
        with box.put("runs/r/uploads/0", "c" * 64, message, {"masked.w": TensorSpec.of(one)}, [one]) as document:
            return bytes(document.read("masked.w"))

    found = in_threads(*(lambda box=box, one=one: put(box, one) for box, one in zip(boxes, words, strict=True)))
    assert found[0] == found[1] and isinstance(found[0], bytes)


def test_a_coordinator_that_takes_two_folds_for_one_run_is_refused(three):
    honest = three.federation.coordinator.run_of_plans
    three.federation.coordinator.run_of_plans = lambda run, *others: honest(run.replace("fold_1", "fold_0"), *others)
    site = masked_site(three.federation, "A", seed=0)
    site.participant.run = RUN.replace("fold_0", "fold_1")
    with pytest.raises(WireError, match=r"takes this training, .*fold_1.*, for .*fold_0"):
        site.register()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trust", "line"),
    [
        ("first_use", "identities of the sites: as first seen, not verified by people"),
        ("verified", "identities of the sites: verified by people (A, B, C)"),
    ],
)
def test_the_record_of_a_round_and_every_log_say_how_sites_trust_each_other(three, monkeypatch, trust, line):
    monkeypatch.setenv("nnUNet_fed_trust", trust)
    sites = sites_of(three, "ABC")
    verify_at(three, *("ABC" if trust == "verified" else ""))
    begin(sites)
    ends = outcomes(sites, play)
    assert all(isinstance(one, messages.Aggregate) for one in ends.values()), ends
    (record,) = three.federation.state.store.load_rounds(RUN)
    assert {site: one["trust"] for site, one in record["sites"].items()} == dict.fromkeys("ABC", trust)
    assert all(any(one.startswith(line) for one in site.lines) for site in sites.values())
