"""An update that does not count is told to everybody: the site, the operator, the audit log, the figures."""

from __future__ import annotations

import pytest
from fake_federation import RUN, in_threads, make_registration, make_settings, make_weights, served, wait_until

from nnunetv2.federated.coordinator.dashboard.overview import Lookout
from nnunetv2.federated.coordinator.dashboard.prometheus import encode, figures
from nnunetv2.federated.protocol import keys, messages
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey, RoundKey

BIG = {"encoder.weight": (256, 128), "head.weight": (64, 256)}  # announced before it is sent


def begin(clients, shapes) -> None:
    """Bring a run of all sites to its first round."""

    def take_part(site):
        registration = make_registration(shapes=shapes, aliases={})
        match = clients[site].exchange(RegistrationKey(RUN), registration).message
        owned = {name: make_weights(0, shapes)[name] for name, owner in match.initial_owner.items() if owner == site}
        clients[site].exchange(InitialKey(RUN), messages.Update(), owned)

    in_threads(*(lambda site=site: take_part(site) for site in clients))


def play(client, number, shapes, seed=1):
    return client.exchange(RoundKey(RUN, number), messages.Update(), make_weights(seed, shapes)).message


@pytest.mark.parametrize("shapes", [{"w.weight": (2, 3)}, BIG], ids=["sent at once", "announced"])
def test_a_late_update_is_told_logged_and_counted_once(tmp_path, shapes):
    settings = make_settings(sites=("A", "B", "C"), num_epochs=4, quorum=2, deadline_s=0.2)
    with served(tmp_path / "federation", settings) as federation:
        lines: list[str] = []
        clients = {"A": federation.client("A"), "B": federation.client("B"), "C": federation.client("C", lines)}
        begin(clients, shapes)
        for number in range(2):
            in_threads(lambda: play(clients["A"], number, shapes), lambda: play(clients["B"], number, shapes))  # noqa: B023
        for _ in range(2):  # a receipt may get lost
            assert play(clients["C"], 1, shapes, seed=3).missing == ("C",)
        said = f"{RoundKey(RUN, 1)}: this site's update came when the round was closed already: it did not count"
        assert said in lines
        assert play(clients["C"], 0, shapes, seed=3).round == 1, "it gets the latest average"
        store = federation.coordinator.store
        events = [(event.site, event.key) for event in store.load_events("late")]
        assert events == [("C", RoundKey(RUN, 1)), ("C", RoundKey(RUN, 0))]
        told = [line for line in federation.lines if "late and does not count" in line]
        assert len(told) == 2 and told[0].startswith(f"{RoundKey(RUN, 1)}: the update of site C is ")
        lookout = Lookout(federation.coordinator)
        assert 'nnunet_fed_late_total{site="C"} 2' in encode(figures(lookout.look(), lookout, refusals={}, sessions=0))
        for client in clients.values():
            client.close()


def test_an_update_that_is_carried_says_where_it_counts(tmp_path):
    settings = make_settings(sites=("A", "B", "C"), num_epochs=4, quorum=2, deadline_s=0.2, late_updates="carry")
    shapes = {"w.weight": (2, 3)}
    with served(tmp_path / "federation", settings) as federation:
        lines: list[str] = []
        clients = {"A": federation.client("A"), "B": federation.client("B"), "C": federation.client("C", lines)}
        begin(clients, shapes)
        in_threads(lambda: play(clients["A"], 0, shapes), lambda: play(clients["B"], 0, shapes))
        receipt = clients["C"].contribute(RoundKey(RUN, 0), messages.Update(), make_weights(3, shapes))
        assert receipt.key == RoundKey(RUN, 1)
        assert lines[-1] == (
            f"{RoundKey(RUN, 0)} was closed before this site's update came: it counts in {RoundKey(RUN, 1)}"
        )
        assert federation.coordinator.store.load_events("late") == []
        for client in clients.values():
            client.close()


def test_a_second_training_with_the_same_credential_is_told_that_it_does_not_count(tmp_path):
    shapes = {"w.weight": (2, 3)}
    with served(tmp_path / "federation", make_settings(num_epochs=3)) as federation:
        lines: list[str] = []
        clients = {"A": federation.client("A"), "B": federation.client("B")}
        begin(clients, shapes)
        clients["A"].contribute(RoundKey(RUN, 0), messages.Update(), make_weights(1, shapes))
        with federation.client("A", lines) as second:
            assert second.contribute(RoundKey(RUN, 0), messages.Update(), make_weights(2, shapes)).already
            assert lines == [
                f"{RoundKey(RUN, 0)}: the coordinator holds another contribution of this site, which counts; what was "
                "sent now is dropped. A second training with this site's credential, or one that was started again"
            ]
            same = second.contribute(RoundKey(RUN, 0), messages.Update(), make_weights(1, shapes))
            assert same.waiting_for == ("B",)
            assert len(lines) == 1, "the same once more is no other training"
        assert federation.coordinator.store.load_events("late") == []
        for client in clients.values():
            client.close()


def test_nobody_is_late_for_a_validation(tmp_path):
    """It belongs to the round before; the next one overtakes it as a matter of course."""
    shapes = {"w.weight": (2, 3)}
    with served(tmp_path / "federation", make_settings(num_epochs=3)) as federation:
        clients = {"A": federation.client("A"), "B": federation.client("B")}
        begin(clients, shapes)
        found = messages.Validation(tp=(1,), fp=(1,), fn=(1,))
        for number in range(2):
            if number == 1:
                clients["A"].contribute(keys.ValidationKey(RUN, 0), found)
            in_threads(lambda: play(clients["A"], number, shapes), lambda: play(clients["B"], number, shapes))  # noqa: B023
        wait_until(lambda: federation.coordinator.book.is_closed(keys.ValidationKey(RUN, 0)))
        clients["B"].contribute(keys.ValidationKey(RUN, 0), found)
        assert federation.coordinator.store.load_events("late") == []
        for client in clients.values():
            client.close()
