"""Epochs and rounds."""

import pytest
from fake_federation import make_registration

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.exchanges.steps.registration import match_registrations
from nnunetv2.federated.protocol.api import FederationSettings, check_rounds
from nnunetv2.federated.protocol.rounds import Rounds


def settings(**values) -> FederationSettings:
    return FederationSettings(**{"federation": "f", "sites": ("A", "B"), "num_epochs": 7, **values})


def test_the_last_round_may_be_shorter():
    rounds = Rounds(3)
    assert [rounds.of(epoch) for epoch in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [epoch for epoch in range(7) if rounds.is_last_of_round(epoch, 7)] == [2, 5, 6]
    assert [rounds.first_epoch(number) for number in range(3)] == [0, 3, 6]
    assert (rounds.count(7), rounds.count(6), rounds.count(1)) == (3, 2, 1)


def test_a_round_of_one_epoch_is_an_epoch():
    rounds = Rounds()
    assert all(rounds.of(e) == rounds.first_epoch(e) == e and rounds.is_last_of_round(e, 9) for e in range(9))


@pytest.mark.parametrize(("every", "num_rounds"), [(1, 7), (2, 4), (7, 1)])
def test_settings_count_rounds(every, num_rounds):
    assert settings(exchange_every=every).num_rounds == num_rounds
    assert settings(exchange_every=every, num_epochs=None).num_rounds is None


def test_a_round_is_no_longer_than_the_training():
    check_rounds(settings(exchange_every=7))
    with pytest.raises(FederationError, match="--exchange-every 8 is more than the 7 epochs"):
        check_rounds(settings(exchange_every=8))


def test_the_default_is_not_said_for_versions_that_do_not_know_it():
    assert "exchange_every" not in settings().model_dump_json()
    match = match_registrations({site: make_registration() for site in "AB"}, settings())
    assert not {"exchange_every", "precision"} & match.model_dump().keys()
    said = settings(exchange_every=3).model_dump_json()
    assert FederationSettings.model_validate_json(said).exchange_every == 3
