"""Sites that drop out of masked rounds at any place, come late, or come again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
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
from masked_sites import FIVE, THREE, MaskedSite, digest_of, masked_settings, masked_site, mean_of

from nnunetv2.federated.coordinator import aggregation_worker
from nnunetv2.federated.coordinator.storage.backup import backup, restore
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.masked_codecs import MaskedWeights
from nnunetv2.federated.privacy.plans_redaction import WITHHELD
from nnunetv2.federated.privacy.secure_aggregation import protocol
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.keys import RoundKey, SurvivorsKey, UploadKey
from nnunetv2.federated.site.credential import load_credential

QUORUM = {"quorum": 4, "deadline_s": 3600.0}


PLANNED_ALONE = make_plans(**{WITHHELD: True})


def all_join(sites):
    starts = in_threads(*(site.join for site in sites))
    assert all(isinstance(start, dict) for start in starts), starts
    return starts[0]


def all_exchange(sites, number, weights):
    """Return the weights after a round of these sites."""
    results = in_threads(*(lambda site=site: site.round(number, weights) for site in sites))
    assert all(isinstance(one, tuple) for one in results), results
    assert len({digest_of(weights) for weights, _ in results}) == 1
    return results[0]


def assert_close(weights, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-5, atol=1e-6)


@pytest.fixture
def five(tmp_path):
    with served(tmp_path / "federation", masked_settings(FIVE, validate_every=0, **QUORUM)) as federation:
        yield federation, [masked_site(federation, name, seed=seed) for seed, name in enumerate(FIVE)]


def operator(federation):
    return federation.coordinator.authenticate(federation.operator_token())


def test_a_site_that_fails_before_its_upload_is_not_waited_for_and_comes_back(five):
    _federation, sites = five
    start = all_join(sites)
    *others, last = sites
    last.participant.report_failure(0, "OutOfMemoryError")
    weights, aggregate = all_exchange(others, 0, start)
    assert aggregate.missing == ("E",) and aggregate.next_round.cohort == FIVE[:4]
    assert_close(weights, mean_of(others, start, 0))
    last.register()  # as every site does that is back, so that it is waited for
    assert last.start().epoch == 1  # it asks to be let in, and is from the next round on
    weights, aggregate = all_exchange(others, 1, weights)
    assert aggregate.next_round.cohort == FIVE
    assert last.start().epoch == 2
    again, aggregate = all_exchange(sites, 2, weights)
    assert sorted(aggregate.contributors) == list(FIVE)
    assert_close(again, mean_of(sites, weights, 2))


def test_a_site_that_is_gone_after_its_upload_counts(five):
    _, sites = five
    start = all_join(sites)
    sites[4].upload(0, start)
    weights, aggregate = all_exchange(sites[:4], 0, start)
    assert sorted(aggregate.contributors) == list(FIVE)
    assert_close(weights, mean_of(sites, start, 0))


def test_with_too_few_answers_a_round_waits_until_it_is_abandoned(five):
    federation, sites = five
    start = all_join(sites)
    for site in sites:
        site.upload(0, start)
    results = []

    def exchange_and_note(site):
        results.append(site.round(0, start))

    threads = [lambda site=site: exchange_and_note(site) for site in sites[:3]]

    def abandon():
        wait_until(lambda: federation.state.registry.has_begun(str(SurvivorsKey(RUN, 0))))
        wait_until(lambda: len(federation.state.registry.get(SurvivorsKey(RUN, 0)).contributions) == 3)
        assert not federation.state.registry.is_closed(SurvivorsKey(RUN, 0))
        act(federation, "abandon")

    outcomes = outcomes_in_threads(*threads, abandon)
    assert len(results) == 3, outcomes
    for weights, aggregate in results:
        assert aggregate.round == 0 and aggregate.contributors == {}
        assert_close(weights, start)
    weights, aggregate = all_exchange(sites, 1, results[0][0]) if restart(sites[3:]) else None
    assert sorted(aggregate.contributors) == list(FIVE)
    assert [bool(record.get("abandoned")) for record in federation.state.store.load_rounds(RUN)] == [True, False]


def restart(sites):
    return all(site.start().epoch == 1 for site in sites)


def act(federation, action):
    from nnunetv2.federated.coordinator.members import Member

    federation.coordinator.act(RUN, api.RunAction(action=action), Member("boss", "operator"))


def test_neither_proceeding_nor_leaving_gets_below_what_unmasks(five):
    federation, sites = five
    start = all_join(sites)
    for site in sites[:3]:
        site.upload(0, start)
    with pytest.raises(RefusedError, match="at least 4"):
        act(federation, "proceed")
    for site in sites[3:]:
        site.participant.transport.act(RUN, "leave")
    assert not federation.state.registry.is_closed(UploadKey(RUN, 0))


def test_proceeding_does_not_get_below_k_where_that_is_more_than_unmask(tmp_path):
    with served(tmp_path / "federation", masked_settings(FIVE, k=5, validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(FIVE)]
        start = all_join(sites)
        for site in sites[:4]:
            site.upload(0, start)
        with pytest.raises(RefusedError, match="at least 5"):
            act(federation, "proceed")
        assert not federation.state.registry.is_closed(UploadKey(RUN, 0))


def test_masks_that_do_not_cancel_out_give_no_average(tmp_path):
    """As where two sites were told other settings: sites alone know, so the coordinator sees it by the sum."""
    settings = masked_settings(THREE, validate_every=0)
    with served(tmp_path / "federation", settings) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        sites[2].participant.settings = settings.model_copy(update={"num_iterations_per_epoch": 1})
        start = all_join(sites)
        outcomes = outcomes_in_threads(*(lambda site=site: site.round(0, start) for site in sites))
        assert all(isinstance(one, RefusedError) and "do not cancel out" in str(one) for one in outcomes), outcomes
        assert not federation.state.registry.is_closed(RoundKey(RUN, 0))
        assert federation.state.store.load_rounds(RUN) == []
        act(federation, "abandon")
        again = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        _, aggregate = all_exchange(again, 1, all_join(again))
        assert sorted(aggregate.contributors) == list(THREE)


def test_a_tensor_of_two_sites_stays_local_and_one_whose_sites_drop_out_keeps_its_values(tmp_path):
    shapes = {"encoder.weight": (40, 30), "head.weight": (2, 4)}
    of_three = {**shapes, "decoder.weight": (5, 5)}
    of_two = {**of_three, "extra.weight": (3, 3)}
    with served(tmp_path / "federation", masked_settings(FIVE, validate_every=0, **QUORUM)) as federation:
        sites = [
            masked_site(federation, name, seed=seed, shapes=one, num_cases=10 + seed, plans=PLANNED_ALONE)
            for seed, (name, one) in enumerate(zip(FIVE, (of_two, of_two, of_three, shapes, shapes), strict=True))
        ]
        in_threads(*(site.join for site in sites))
        match = sites[0].participant.match
        assert match.kept_local == ("extra.weight",)
        assert "extra.weight" not in match.shared and "decoder.weight" in match.shared
        starts = {site.seed: dict(site.start().weights) for site in sites}
        sites[2].participant.report_failure(0, "OutOfMemoryError")
        others = [site for site in sites if site.seed != 2]
        results = in_threads(*(lambda site=site: site.round(0, starts[site.seed]) for site in others))
        weights, _ = results[0]
        np.testing.assert_array_equal(weights["decoder.weight"], starts[0]["decoder.weight"])
        expected = mean_of(others, {name: starts[0][name] for name in shapes}, 0)
        assert_close(weights, expected)
        assert any("sums stay sealed" in line for line in federation.lines)


def test_a_floor_that_is_raised_holds_for_every_tensor(tmp_path):
    shapes = {"encoder.weight": (40, 30), "head.weight": (2, 4)}
    of_three = {**shapes, "decoder.weight": (5, 5)}
    with served(tmp_path / "federation", masked_settings(FIVE, validate_every=0)) as federation:
        sites = [
            masked_site(federation, name, seed=seed, shapes=one, num_cases=10 + seed, plans=PLANNED_ALONE)
            for seed, (name, one) in enumerate(zip(FIVE, (of_three, of_three, of_three, shapes, shapes), strict=True))
        ]
        starts = in_threads(*(site.join for site in sites))
        federation.coordinator.change_settings(api.SettingsChange(min_sites=4), by="boss")
        results = in_threads(
            *(lambda site=site, start=start: site.round(0, start) for site, start in zip(sites, starts, strict=True))
        )
        weights, _ = results[0]
        np.testing.assert_array_equal(weights["decoder.weight"], starts[0]["decoder.weight"])
        assert_close(weights, mean_of(sites, {name: starts[0][name] for name in shapes}, 0))
        assert any("1 tensors keep their values" in line for line in federation.lines)


def test_a_latecomer_is_in_the_round_after_the_one_that_is_open(tmp_path):
    with served(tmp_path / "federation", masked_settings((*THREE, "D"), validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate((*THREE, "D"))]
        *first, late = sites
        keys = in_threads(*(site.register for site in first), lambda: proceed_when_three(federation))
        assert not any(isinstance(one, BaseException) for one in keys), keys
        start = in_threads(*(site.start for site in first))[0].weights
        late.register()
        assert late.start().epoch == 0
        weights, aggregate = all_exchange(first, 0, start)
        assert aggregate.next_round.cohort == ("A", "B", "C", "D")
        late.start()
        again, aggregate = all_exchange(sites, 1, weights)
        assert sorted(aggregate.contributors) == ["A", "B", "C", "D"]
        assert_close(again, mean_of(sites, weights, 1))


def proceed_when_three(federation):
    key = f"runs/{RUN}/registration"
    from nnunetv2.federated.exchanges.steps import parse_key

    wait_until(lambda: federation.state.registry.has_begun(key))
    wait_until(lambda: len(federation.state.registry.get(parse_key(key)).contributions) == 3)
    act(federation, "proceed")


# ------------------------------------------------------------------------------------------------- coming a second time
def test_a_site_that_trains_again_sends_what_it_has_masked_first(five, tmp_path):
    federation, sites = five
    start = all_join(sites)
    sites[0].upload(0, start)
    held = federation.state.registry.get(UploadKey(RUN, 0)).contributions["A"].digest
    again = masked_site(
        federation, "A", seed=0, trained=lambda number: 7.0
    )  # an unseeded training finds something else
    begin = again.join()
    again.upload(0, begin)
    assert federation.state.registry.get(UploadKey(RUN, 0)).contributions["A"].digest == held
    weights, aggregate = all_exchange([again, *sites[1:]], 0, start)
    assert sorted(aggregate.contributors) == list(FIVE)
    assert_close(weights, mean_of(sites, start, 0))


def test_a_site_whose_outbox_is_lost_sits_the_round_out(five):
    federation, sites = five
    start = all_join(sites)
    masked = sites[0].participant._masked
    masked._masking.transport = Silent(masked.transport)
    with pytest.raises(ConnectionError):
        sites[0].upload(0, start)
    (outbox,) = federation.state.store.folder.glob("credential.A.json.secure/*/runs/*/outbox")
    for path in outbox.iterdir():
        path.unlink()
    again = masked_site(federation, "A", seed=0)
    again.join()
    weights, aggregate = all_exchange([again, *sites[1:]], 0, start)
    assert aggregate.missing == ("A",)
    assert any("does not answer a second time" in line for line in again.lines)
    assert_close(weights, mean_of(sites[1:], start, 0))
    again.start()
    weights, aggregate = all_exchange(sites[1:], 1, weights)
    assert aggregate.next_round.cohort == FIVE


def test_what_was_masked_for_a_round_that_went_on_without_its_site_does_not_stay_on_its_disk(five):
    federation, sites = five
    start = all_join(sites)
    sites[4].upload(0, start)
    weights, _ = all_exchange(sites[:4], 0, start)
    again = masked_site(federation, "E", seed=4)
    again.join()
    (outbox,) = federation.state.store.folder.glob("credential.E.json.secure/*/runs/*/outbox")
    assert [path.name for path in outbox.iterdir()] == [f"runs~{RUN}~uploads~0.safetensors"]
    again.upload(1, weights)
    all_exchange([*sites[:4], again], 1, weights)
    assert not list(outbox.iterdir())


class Silent:
    """A transport that loses every contribution before it leaves."""

    def __init__(self, transport):
        self._transport = transport

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def contribute(self, *_, **__):
        raise ConnectionError("lost")


def test_a_late_update_is_not_taken_and_its_site_gets_the_average(five):
    federation, sites = five
    start = all_join(sites)
    *others, last = sites
    last.participant.report_failure(0, "OutOfMemoryError")
    weights, _ = all_exchange(others, 0, start)
    received, aggregate = last.round(0, start)
    assert aggregate.round == 0 and aggregate.missing == ("E",)
    assert digest_of(received) == digest_of(weights)
    assert "E" not in federation.state.registry.get(UploadKey(RUN, 0)).contributions


# ---------------------------------------------------------------------------------------------------- half precision
def test_half_precision_comes_as_close_to_the_mean_as_its_steps_allow(tmp_path):
    settings = masked_settings(THREE, validate_every=0, precision="float16", num_epochs=None)
    with served(tmp_path / "federation", settings) as federation:
        sites = [masked_site(federation, name, seed=seed, num_cases=20 + seed) for seed, name in enumerate(THREE)]
        all_join(sites)
        weights = sites[0].start().weights
        exact = {name: values.astype(np.float64) for name, values in weights.items()}
        for number in range(8):
            weights, _ = all_exchange(sites, number, weights)
            exact = mean_of(sites, {name: values.astype(np.float32) for name, values in exact.items()}, number)
        for name, values in exact.items():
            # Changes are cut to four times the last one, so the first rounds catch up by error feedback.
            assert np.abs(weights[name].astype(np.float64) - values).max() < 0.05, name
        with federation.state.documents.result(RoundKey(RUN, 7)) as document:
            assert {spec.dtype for spec in document.specs.values()} == {"F32"}
        assert weights["encoder.weight"].dtype == np.float16
        assert make_weights(0)["encoder.weight"].dtype == np.float32


def test_what_rounding_took_from_a_sum_that_stays_sealed_is_still_due(tmp_path):
    shapes, of_three = {"encoder.weight": (20, 30)}, {"encoder.weight": (20, 30), "decoder.weight": (5, 5)}
    settings = masked_settings(FIVE, validate_every=0, precision="float16", **QUORUM)
    with served(tmp_path / "federation", settings) as federation:
        sites = [
            masked_site(
                federation,
                name,
                seed=seed,
                shapes=of_three if seed < 3 else shapes,
                num_cases=10 + seed,
                plans=PLANNED_ALONE,
            )
            for seed, name in enumerate(FIVE)
        ]
        in_threads(*(site.join for site in sites))
        starts = [dict(site.position.weights) for site in sites]
        results = in_threads(
            *(lambda s=site, w=start: s.round(0, w) for site, start in zip(sites, starts, strict=True))
        )
        codec = sites[0].participant._masked._codec
        due = {name: rest.copy() for name, rest in codec._rests.items()}
        assert due.keys() == of_three.keys() and all(rest.any() for rest in due.values())
        sites[2].participant.report_failure(1, "OutOfMemoryError")
        others = [0, 1, 3, 4]
        in_threads(*(lambda n=number: sites[n].round(1, results[n][0]) for number in others))
        assert any("sums stay sealed" in line for line in federation.lines)
        np.testing.assert_array_equal(codec._rests["decoder.weight"], due["decoder.weight"])
        assert not np.array_equal(codec._rests["encoder.weight"], due["encoder.weight"])


# ------------------------------------------------------------------------------------------------------------- backups
def reconnected(federation, site):
    """Return a site of a federation as a new process, at the coordinator's present address."""
    credential = replace(load_credential(site), url=federation.url)
    name = site.name.split(".")[1]
    return MaskedSite(make_client(credential), credential, site, seed=THREE.index(name))


def test_rounds_that_were_closed_before_a_backup_was_restored_are_not_answered_again(tmp_path):
    settings = masked_settings(THREE, validate_every=0, num_epochs=6)
    with served(tmp_path / "federation", settings) as federation:
        files = {name: tmp_path / "federation" / f"credential.{name}.json" for name in THREE}
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        weights = all_join(sites)
        for number in range(2):
            weights, _ = all_exchange(sites, number, weights)
        backup(tmp_path / "federation", tmp_path / "backup.tar")
        for number in range(2, 4):
            weights, _ = all_exchange(sites, number, weights)
    restore(tmp_path / "backup.tar", tmp_path / "restored")
    with served(tmp_path / "restored", settings) as federation:
        sites = [reconnected(federation, file) for file in files.values()]
        begin = all_join(sites)
        in_threads(*(lambda site=site: site.round(2, begin) for site in sites), lambda: abandon_each(federation, sites))
        assert not federation.state.registry.get(UploadKey(RUN, 2)).contributions
        starts = in_threads(*(site.start for site in sites))
        assert [start.epoch for start in starts] == [4, 4, 4], starts
        weights, aggregate = all_exchange(sites, 4, starts[0].weights)
        assert aggregate.round == 4 and sorted(aggregate.contributors) == list(THREE)


def abandon_each(federation, sites):
    """Close the rounds that the sites know already, as soon as all have said so."""
    wait_until(lambda: all(any("is over" in line for line in site.lines) for site in sites))
    act(federation, "abandon")
    act(federation, "abandon")


def test_a_backup_between_two_steps_of_a_round_has_what_was_masked(tmp_path):
    settings = masked_settings(THREE, validate_every=0)
    with served(tmp_path / "federation", settings) as federation:
        files = [tmp_path / "federation" / f"credential.{name}.json" for name in THREE]
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        start = all_join(sites)
        for site in sites:
            site.upload(0, start)
        wait_until(lambda: federation.state.registry.is_closed(UploadKey(RUN, 0)))
        backup(tmp_path / "federation", tmp_path / "backup.tar")
    restore(tmp_path / "backup.tar", tmp_path / "restored")
    with served(tmp_path / "restored", settings) as federation:
        again = [reconnected(federation, file) for file in files]
        weights, aggregate = all_exchange(again, 0, all_join(again))
        assert sorted(aggregate.contributors) == list(THREE)
        assert_close(weights, mean_of(sites, start, 0))


def test_whoever_comes_to_a_round_that_was_abandoned_before_anybody_came_gets_the_average(five):
    federation, sites = five
    start = all_join(sites)
    act(federation, "abandon")
    weights, aggregate = all_exchange(sites, 0, start)
    assert aggregate.round == 0 and aggregate.contributors == {}
    assert_close(weights, start)
    _, aggregate = all_exchange(sites, 1, weights)
    assert sorted(aggregate.contributors) == list(FIVE)


def test_a_survivor_that_asks_when_the_round_is_over_gets_the_average(five):
    federation, sites = five
    start = all_join(sites)
    sites[4].upload(0, start)
    weights, _ = all_exchange(sites[:4], 0, start)
    wait_until(lambda: not any_masked_file(federation))
    received, aggregate = sites[4].round(0, start)
    assert aggregate.round == 0 and digest_of(received) == digest_of(weights)


def any_masked_file(federation):
    folder = federation.state.store.folder / "gatherings" / "runs" / RUN / "uploads" / "0"
    return [path for path in folder.glob("*.safetensors") if not path.name.startswith("result")]


# --------------------------------------------------------------------------------------------------------- false shares
def test_a_site_that_answers_with_false_shares_is_named_and_the_round_goes_on(tmp_path, monkeypatch):
    reveal = protocol.reveal_shares

    def has_answered():
        key, registry = RoundKey(RUN, 0), federation.state.registry
        exchange = registry.get(key)
        return registry.is_closed(key) or (exchange is not None and "B" in exchange.contributions)

    def revealing(cohort, site, *arguments, **options):
        if site != "B":
            wait_until(has_answered)  # a round that has answers enough does not look at later ones
        return reveal(cohort, site, *arguments, **options) ^ np.uint8(site == "B")

    monkeypatch.setattr(protocol, "reveal_shares", revealing)
    monkeypatch.setattr(aggregation_worker, "RETRY_CLOSING_S", 0.1)
    with served(tmp_path / "federation", masked_settings(FIVE, validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(FIVE)]
        start = all_join(sites)
        weights, aggregate = all_exchange(sites, 0, start)
        assert sorted(aggregate.contributors) == list(FIVE)  # the weights of B are good
        assert_close(weights, mean_of(sites, start, 0))
        wait_until(lambda: any("the shares of site B are false" in line for line in federation.lines))


@pytest.mark.parametrize("cheated", ["A", "ABCD"])
def test_a_site_that_seals_what_does_not_open_is_named_and_ends_no_training(tmp_path, monkeypatch, cheated):
    share = protocol.share_keys

    def sharing(cohort, site, *arguments):
        shared = share(cohort, site, *arguments)
        if site != "E":
            return shared
        envelopes = {other: bytes(len(one)) if other in cheated else one for other, one in shared.envelopes.items()}
        return replace(shared, envelopes=envelopes)

    settled = []
    monkeypatch.setattr(MaskedWeights, "settle", lambda codec, names: settled.append(codec))
    monkeypatch.setattr(protocol, "share_keys", sharing)
    with served(tmp_path / "federation", masked_settings(FIVE, validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(FIVE)]
        start = all_join(sites)

        def abandon():
            if len(cheated) > 1:  # fewer than t can answer
                told = "the shares that site E has sealed for this site cannot be used"
                wait_until(lambda: sum(told in line for line in federation.lines) == len(cheated))
                act(federation, "abandon")

        *results, _ = in_threads(*(lambda site=site: site.round(0, start) for site in sites), abandon)
        assert all(aggregate.round == 0 for _, aggregate in results), results
        assert sorted(results[0][1].contributors) == (list(FIVE) if cheated == "A" else [])
        if cheated == "A":
            assert_close(results[0][0], mean_of(sites, start, 0))
        assert len(settled) == (len(FIVE) if cheated == "A" else 0)  # A, which gave no shares, has counted too


def test_a_site_that_deals_false_shares_is_named_and_its_round_can_be_abandoned(tmp_path, monkeypatch):
    share = protocol.share_keys

    def sharing(cohort, site, *arguments):
        shared = share(cohort, site, *arguments)
        return replace(shared, commitments=shared.commitments ^ np.uint8(site == "B"))

    monkeypatch.setattr(aggregation_worker, "RETRY_CLOSING_S", 0.1)
    with served(tmp_path / "federation", masked_settings(FIVE, validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(FIVE)]
        start = all_join(sites)
        with monkeypatch.context() as false:
            false.setattr(protocol, "share_keys", sharing)
            outcomes = outcomes_in_threads(*(lambda site=site: site.round(0, start) for site in sites))
        assert {one.code for one in outcomes} == {"shares_do_not_fit"}, outcomes
        assert "do not rebuild the seeds of B:" in str(outcomes[0])
        act(federation, "abandon")
        again = [masked_site(federation, name, seed=seed) for seed, name in enumerate(FIVE)]
        start = all_join(again)
        weights, aggregate = all_exchange(again, 1, start)
        assert sorted(aggregate.contributors) == list(FIVE)
        assert_close(weights, mean_of(again, start, 1))
