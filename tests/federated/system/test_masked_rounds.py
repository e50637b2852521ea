"""Masked rounds over real HTTP: the mean is right, nobody sees an update, and runs outlast sites that drop out."""

from __future__ import annotations

import numpy as np
import pytest
from fake_federation import RUN, SHAPES, in_threads, make_registration, make_settings, make_weights, served, wait_until
from masked_sites import FIVE, THREE, digest_of, masked_settings, masked_site, mean_of

from nnunetv2.federated.coordinator.dashboard.curves import build_curves
from nnunetv2.federated.coordinator.dashboard.overview import OverviewBuilder
from nnunetv2.federated.privacy.secure_aggregation import masking, protocol
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import RoundKey, UploadKey
from nnunetv2.federated.protocol.rounds import Rounds


@pytest.mark.parametrize("names", [THREE, FIVE])
def test_masked_rounds_give_the_weighted_mean(tmp_path, names):
    with served(tmp_path / "federation", masked_settings(names)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(names)]
        digests = in_threads(*(lambda site=site: site.train(3) for site in sites))
        assert len(set(digests)) == 1, digests
        start = make_weights(len(names) - 1)  # the site with most cases owns all tensors
        for number in range(3):
            start = {name: mean.astype(np.float32) for name, mean in mean_of(sites, start, number).items()}
        with federation.state.documents.result(RoundKey(RUN, 2)) as document:
            for name, values in start.items():
                np.testing.assert_allclose(document.read(name), values, rtol=1e-5, atol=1e-6)
            assert document.message.contributors == dict.fromkeys(names, 1.0)
            assert digest_of({name: document.read(name) for name in start}) == digests[0]
        records = federation.state.store.load_rounds(RUN)
        assert [record["pooled"]["conspicuous"] for record in records] == [0, 0, 0]
        assert federation.state.store.load_last_validation(RUN)["round"] == 2


def test_rounds_of_several_epochs_are_masked_and_leave_no_keys(tmp_path):
    """A site that goes on within a round knows what it has masked from, and when the run is over."""
    with served(tmp_path / "federation", masked_settings(THREE, num_epochs=4, exchange_every=2)) as federation:

        def take_part(name: str, seed: int) -> str:
            weights = masked_site(federation, name, seed=seed).join()
            again = masked_site(federation, name, seed=seed)
            again.register()
            position = again.participant.start(1, weights, rounds=Rounds(2), num_epochs=4)
            assert (position.epoch, position.is_within) == (1, True)
            weights, _ = again.round(0, weights)
            again.participant.finish()
            has_keys = bool(run_keys(federation, name))
            weights, _ = again.round(1, weights)
            again.participant.finish()
            assert has_keys and not run_keys(federation, name)
            return digest_of(weights)

        digests = in_threads(*(lambda n=name, s=seed: take_part(n, s) for seed, name in enumerate(THREE)))
        assert len(set(digests)) == 1, digests


def run_keys(federation, site: str) -> list:
    folder = federation.credential_file(site)
    return list(folder.with_name(f"{folder.name}.secure").glob("*/runs/**/*.pem"))


def test_people_see_what_all_sites_have_in_common_and_of_no_site(tmp_path):
    """The pooled figures are those of the plain run; of one site, nobody learns loss, Dice or distance."""
    with served(tmp_path / "federation", masked_settings(THREE)) as federation:
        sites = [masked_site(federation, name, seed=seed) for seed, name in enumerate(THREE)]
        in_threads(*(lambda site=site: site.train(3) for site in sites))
        store = federation.state.store
        curves = build_curves(federation.state, RUN)
        overview = OverviewBuilder(federation.coordinator).build().model_dump(mode="json")
        records = [*store.load_rounds(RUN), *store.load_validations(RUN)]
    cases = np.array([1, 2, 3])
    for number, one in enumerate(curves.rounds):
        assert set(one.sites) == set(THREE)
        assert all(point.metrics == {} and point.bytes > 0 for point in one.sites.values())
        losses = [-0.25 * (seed + number) for seed in range(3)]
        assert one.pooled["train_losses"] == pytest.approx(np.average(losses, weights=cases), abs=1e-6)
        if number < 2:
            dice = [0.5 + 0.1 * seed for seed in range(3)]
            assert one.pooled["mean_fg_dice"] == pytest.approx(np.average(dice, weights=cases), abs=1e-6)
        assert one.conspicuous == 0 and one.outliers == ()
    assert [one.round for one in curves.validations] == [0, 1, 2]
    for one in curves.validations:
        assert one.dice_of_site == one.loss_of_site == {}
        tp = sum(10.0 * (one.round + 1) + seed for seed in range(3))
        assert one.mean_dice == 2 * tp / (2 * tp + 3 * 1.0 + 3 * 2.0)
    for record in records:
        for held in record.get("sites", {}).values():
            assert held.keys() == {"weight", "trust", "digest", "bytes", "received"}
        assert not record.get("dice_of_site") and not record.get("loss_of_site")
    assert "dice_of_site" not in str(overview) and "loss" not in str(overview)


def test_a_site_that_moves_much_farther_than_the_others_is_counted_and_not_named(tmp_path):
    def lost(number):
        return 3.0 if number == 2 else 0.0

    with served(tmp_path / "federation", masked_settings(THREE, validate_every=0)) as federation:
        sites = [
            masked_site(federation, name, seed=seed, **({"trained": lost} if name == "B" else {}))
            for seed, name in enumerate(THREE)
        ]
        in_threads(*(lambda site=site: site.train(3) for site in sites))
        curves = build_curves(federation.state, RUN)
    assert [one.conspicuous for one in curves.rounds] == [0, 0, 1]
    assert [site.participant.site for site in sites if any("times as far" in line for line in site.lines)] == ["B"]
    assert any("1 site moved" in line for line in federation.lines)
    assert not any("site B" in line and "moved" in line for line in federation.lines)


def run_of_three(folder, shapes=SHAPES):
    """Return the SHA-256 of the last aggregate of a masked run."""
    with served(folder, masked_settings(THREE)) as federation:
        sites = [masked_site(federation, name, seed=seed, shapes=shapes) for seed, name in enumerate(THREE)]
        digests = in_threads(*(lambda site=site: site.train(3) for site in sites))
        assert len(set(digests)) == 1, digests
        return federation.state.store.load_result_digest(RoundKey(RUN, 2))


def test_the_average_is_that_of_masks_that_are_all_zero(tmp_path, monkeypatch):
    """To the bit, and whoever has answered first: masks leave nothing behind."""
    with_masks = run_of_three(tmp_path / "masked")
    monkeypatch.setattr(masking.Keystreams, "apply_", lambda self, words: None)
    assert run_of_three(tmp_path / "zeros") == with_masks


def test_nothing_that_the_coordinator_stores_shows_a_part_of_an_update(tmp_path, monkeypatch):
    shapes = {"encoder.weight": (60, 50), "head.weight": (2, 4)}
    plain, seeds = [], []
    mask, share = protocol.mask_input_, protocol.share_keys

    def noting_words(words, lane, site, shared):
        plain.append(words.tobytes())
        mask(words, lane, site, shared)

    def noting_seeds(*arguments, **options):
        shared = share(*arguments, **options)
        seeds.extend(shared.seeds.values())
        return shared

    monkeypatch.setattr(protocol, "mask_input_", noting_words)
    monkeypatch.setattr(protocol, "share_keys", noting_seeds)
    with served(tmp_path / "federation", masked_settings(THREE, validate_every=0)) as federation:
        sites = [masked_site(federation, name, seed=seed, shapes=shapes) for seed, name in enumerate(THREE)]
        start = in_threads(*(site.join for site in sites))[0]
        for site in sites:
            site.upload(0, start)
            plain.extend(np.ascontiguousarray(values).tobytes() for values in site.epoch(0, start).values())
        wait_until(lambda: federation.state.registry.is_closed(UploadKey(RUN, 0)))
        files = [
            path for path in (tmp_path / "federation").rglob("*") if path.is_file() and "credential." not in str(path)
        ]
        stored = [path.read_bytes() for path in files]
    assert sum(len(content) > 12_000 for content in stored) >= 3 and len(seeds) > 9
    found = {content[at : at + 16] for content in stored for at in range(len(content) - 15)}
    windows = {words[at : at + 16] for words in plain for at in range(0, len(words) - 15, 4)}
    assert not {window for window in windows if window.count(0) < 6} & found  # zeros in a row are everywhere
    assert not any(seed in content for seed in seeds for content in stored)


def test_without_masks_messages_are_those_of_the_version_before():
    """An older site reads the settings, the match and the aggregate of a federation in clear."""
    settings = make_settings()
    assert "secure" not in settings.model_dump_json()
    match = messages.Match(
        rule="name",
        weighting="cases",
        weights={"A": 1.0},
        shared={"w": {"A": "w"}},
        initial_owner={"w": "A"},
        coverage={"A": (1, 1)},
    )
    assert not {"keys", "kept_local"} & match.model_dump().keys()
    assert "next_round" not in messages.Aggregate(round=0, contributors={"A": 1.0}).model_dump_json()
    assert not {"keys", "trust"} & make_registration().model_dump().keys()
