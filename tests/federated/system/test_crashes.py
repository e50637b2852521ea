"""Crashes on either side: nothing acknowledged is lost, nothing counts twice, the result is the same to the bit."""

import threading
import time

import numpy as np
import pytest
from fake_federation import (
    RUN,
    coordinator_process,
    in_threads,
    incoming_path,
    make_census,
    make_client,
    make_registration,
    make_settings,
    make_weights,
    served,
    start_site_process,
    train,
    wait_until,
)
from patience import PATIENCE_S

from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, file_digest, write_document
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, RegistrationKey, RoundKey

NUM_ROUNDS = 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    """Return the digest of the last aggregate of a run in which nothing goes wrong."""
    settings = make_settings(num_epochs=NUM_ROUNDS)
    with (
        served(tmp_path_factory.mktemp("undisturbed") / "federation", settings) as federation,
        federation.client("A") as a,
        federation.client("B") as b,
    ):
        first, second = in_threads(
            lambda: train(a, seed=1, num_rounds=NUM_ROUNDS), lambda: train(b, seed=2, num_rounds=NUM_ROUNDS)
        )
        assert first == second
        return first


def test_a_run_survives_a_coordinator_that_is_killed_again_and_again(tmp_path, undisturbed):
    with coordinator_process(tmp_path / "federation", "--sites", "A", "B", "--epochs", str(NUM_ROUNDS)) as process:
        credentials = process.credentials()
        lines: list[str] = []
        digests: list[object] = []
        reached = {number: threading.Event() for number in (1, 3, 6)}
        killed = {number: threading.Event() for number in reached}

        def hold(number: int) -> None:
            """Keep B from going on until the coordinator has been killed, while A sends its update and waits."""
            if number in reached:
                reached[number].set()
                assert killed[number].wait(PATIENCE_S)

        def run_sites():
            with make_client(credentials["A"], lines) as a, make_client(credentials["B"]) as b:
                digests.extend(
                    in_threads(
                        lambda: train(a, seed=1, num_rounds=NUM_ROUNDS),
                        lambda: train(b, seed=2, num_rounds=NUM_ROUNDS, on_round=hold),
                    )
                )

        sites = threading.Thread(target=run_sites, daemon=True)
        sites.start()
        for number, is_reached in reached.items():
            assert is_reached.wait(PATIENCE_S)
            told = len(lines)
            process.kill()
            wait_until(lambda: any("trying again" in line for line in lines[told:]))  # noqa: B023 - called at once
            process.start()
            killed[number].set()
        sites.join(PATIENCE_S)
        assert not sites.is_alive()
        assert digests == [undisturbed, undisturbed]
        assert "the coordinator answers again" in lines


def test_a_site_that_is_killed_comes_back(tmp_path, undisturbed):
    with (
        coordinator_process(tmp_path / "federation", "--sites", "A", "B", "--epochs", str(NUM_ROUNDS)) as process,
        make_client(process.credentials()["A"]) as a,
    ):
        digests: list[str] = []
        other = threading.Thread(
            target=lambda: digests.append(train(a, seed=1, num_rounds=NUM_ROUNDS, pause_s=0.05)), daemon=True
        )
        other.start()
        site = start_site_process(tmp_path / "B.json", seed=2, num_rounds=NUM_ROUNDS, pause_s=0.05, hold_at=2)
        for line in site.stdout:
            if line.strip() == "round 2":
                break
        site.kill()
        site.wait()
        site.stdout.close()
        assert other.is_alive()  # it waits for B
        site = start_site_process(tmp_path / "B.json", seed=2, num_rounds=NUM_ROUNDS, pause_s=0.0)
        output, _ = site.communicate(timeout=PATIENCE_S)
        other.join(PATIENCE_S)
        assert digests == [undisturbed]
        assert output.split()[-1] == undisturbed
        assert "round 1\n" not in output  # it went on where the run was


# ------------------------------------------------------------------------- crashes at chosen places, in this process
class Crash(BaseException):
    """Stands for the end of the process: nothing of the coordinator runs after it."""


def fill(coordinator: Coordinator, key: str, site: str, message, tensors=None) -> None:
    """Contribute to an exchange without HTTP."""
    tensors = tensors or {}
    path = incoming_path(coordinator.state.store)
    digest = write_document(path, message, {name: TensorSpec.of(v) for name, v in tensors.items()}, tensors.values())
    coordinator.contribute(key, site, path, digest, path.stat().st_size)


def close_what_is_ready(coordinator: Coordinator) -> None:
    for exchange in coordinator.worker._ready():
        coordinator.worker._close(exchange.key)


def fill_up_to_round_0(coordinator: Coordinator) -> None:
    for site in "AB":
        fill(coordinator, RegistrationKey(RUN), site, make_registration(2 if site == "A" else 1))
    close_what_is_ready(coordinator)
    fill(coordinator, InitialKey(RUN), "A", messages.Update(), make_weights(0))
    fill(coordinator, InitialKey(RUN), "B", messages.Update())
    close_what_is_ready(coordinator)
    for seed, site in enumerate("AB"):
        fill(coordinator, RoundKey(RUN, 0), site, messages.Update(), make_weights(seed))


@pytest.fixture
def folder(tmp_path):
    with Store(tmp_path / "federation") as store:
        create_federation(store, make_settings(num_epochs=1), now=time.time())
    return tmp_path / "federation"


def expected_digest(tmp_path) -> str:
    with Store(tmp_path / "expected") as store:
        create_federation(store, make_settings(num_epochs=1), now=time.time())
        coordinator = Coordinator(store)
        fill_up_to_round_0(coordinator)
        close_what_is_ready(coordinator)
        return store.load_result_digest(RoundKey(RUN, 0))


@pytest.mark.parametrize("place", ["before the result", "after the result", "after the row", "while writing the model"])
def test_a_crash_while_a_round_is_closed_changes_nothing(folder, tmp_path, monkeypatch, place):
    from nnunetv2.federated.aggregation import weighted_mean
    from nnunetv2.federated.coordinator.models import model_store

    def crash(*_, **__):
        raise Crash

    with Store(folder) as store:
        coordinator = Coordinator(store)
        fill_up_to_round_0(coordinator)
        if place == "before the result":
            monkeypatch.setattr(weighted_mean, "aggregate_documents", crash)
        elif place == "after the result":
            monkeypatch.setattr(store, "save_closing", crash)
        elif place == "after the row":
            monkeypatch.setattr(coordinator.state.registry, "put", crash)
        else:
            monkeypatch.setattr(model_store, "keep_models", crash)
        with pytest.raises(Crash):
            close_what_is_ready(coordinator)
    monkeypatch.undo()
    with Store(folder) as store:
        coordinator = Coordinator(store)
        coordinator.start()
        wait_until(lambda: coordinator.run_state(RUN).closed and store.load_events("model"))
        coordinator.stop()
        digest = store.load_result_digest(RoundKey(RUN, 0))
        assert digest == file_digest(store.result_path(RoundKey(RUN, 0))) == expected_digest(tmp_path)
        closings = [event for event in store.load_events("closing") if event.key == RoundKey(RUN, 0)]
        assert len(closings) == 1
        model = folder / "models" / "nnUNetTrainerFake__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth"
        assert model.exists()


@pytest.mark.parametrize("place", ["before the file", "after the file", "after the row"])
def test_a_crash_while_a_contribution_is_taken_over(folder, monkeypatch, place):
    from nnunetv2.federated.coordinator.storage import store as store_module

    def crash(*_, **__):
        raise Crash

    with Store(folder) as store:
        coordinator = Coordinator(store)
        if place == "before the file":
            monkeypatch.setattr(store_module, "flush_to_disk", crash)
        elif place == "after the file":
            monkeypatch.setattr(store._database, "transaction", crash)
        else:
            monkeypatch.setattr(coordinator.state.registry, "put", crash)
        with pytest.raises(Crash):
            fill(coordinator, CensusKey(), "A", make_census())
    monkeypatch.undo()
    with Store(folder) as store:
        coordinator = Coordinator(store)
        held = coordinator.state.registry.get(CensusKey())
        assert (held is not None) == (place == "after the row")
        fill(coordinator, CensusKey(), "A", make_census())  # the site got no receipt, and sends it again
        assert len(store.load_events("contribution")) == 1
        fill(coordinator, CensusKey(), "B", make_census())
        close_what_is_ready(coordinator)
        assert coordinator.state.registry.is_closed(CensusKey())


def test_the_result_does_not_depend_on_the_order_of_arrival(tmp_path):
    digests = set()
    for order in ("AB", "BA"):
        with Store(tmp_path / order) as store:
            create_federation(store, make_settings(num_epochs=1), now=time.time())
            coordinator = Coordinator(store)
            for site in order:
                fill(coordinator, RegistrationKey(RUN), site, make_registration(2 if site == "A" else 1))
            close_what_is_ready(coordinator)
            for site in order:
                fill(coordinator, InitialKey(RUN), site, messages.Update(), make_weights(0) if site == "A" else {})
            close_what_is_ready(coordinator)
            for site in order:
                fill(coordinator, RoundKey(RUN, 0), site, messages.Update(), make_weights(ord(site)))
            close_what_is_ready(coordinator)
            digests.add(store.load_result_digest(RoundKey(RUN, 0)))
    assert len(digests) == 1


def test_trouble_of_the_machine_is_shown_and_outlasted(folder, monkeypatch):
    from nnunetv2.federated.exchanges.steps import base

    now = 100.0
    lines: list[str] = []
    with Store(folder) as store:
        coordinator = Coordinator(store, log=lines.append, clock=lambda: now)
        for site in "AB":
            fill(coordinator, CensusKey(), site, make_census())

        def no_space(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(base, "write_document", no_space)
        close_what_is_ready(coordinator)
        assert "fingerprint/census cannot be closed, trying again in 15 s" in lines[-1]
        with pytest.raises(OSError, match="No space left on device"):
            coordinator.result(CensusKey(), "A")
        assert coordinator.worker._ready() == []
        assert coordinator.worker._seconds_until_next() == 15
        monkeypatch.undo()
        now += 16
        assert coordinator.worker._seconds_until_next() is None  # no wait of 0 s, over and over
        close_what_is_ready(coordinator)
        assert coordinator.state.registry.is_closed(CensusKey())
        coordinator.result(CensusKey(), "A")


def test_a_clock_that_is_set_back_delays_nothing_for_long(folder, monkeypatch):
    from nnunetv2.federated.exchanges.steps import base

    now = 1e6
    with Store(folder) as store:
        coordinator = Coordinator(store, clock=lambda: now)
        for site in "AB":
            fill(coordinator, CensusKey(), site, make_census())
        with monkeypatch.context() as patch:
            patch.setattr(base, "write_document", lambda *_: 1 / 0)
            close_what_is_ready(coordinator)
        assert coordinator.worker._ready() == []
        now -= 3600.0
        close_what_is_ready(coordinator)
        assert coordinator.state.registry.is_closed(CensusKey())
        fill(coordinator, RegistrationKey(RUN), "A", make_registration(1))
        now -= 3600.0
        assert Coordinator(store, clock=lambda: now).state.registry.get(RegistrationKey(RUN)).opened == now


def test_models_that_cannot_be_written_are_written_later(folder, monkeypatch):
    """A full disk at the end of a run neither stops other runs, nor the next start, nor is forgotten."""
    from nnunetv2.federated.coordinator import aggregation_worker
    from nnunetv2.federated.coordinator.models import model_store

    lines: list[str] = []
    with Store(folder) as store:
        coordinator = Coordinator(store, log=lines.append)
        fill_up_to_round_0(coordinator)
        keep = model_store.keep_models

        def no_space(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(model_store, "keep_models", no_space)
        monkeypatch.setattr(aggregation_worker, "RETRY_TIDYING_S", 0.05)
        for number in range(coordinator.settings.num_epochs):
            for site in "AB":
                fill(coordinator, RoundKey(RUN, number), site, messages.Update(), make_weights(1))
            close_what_is_ready(coordinator)
        assert coordinator.state.registry.run_state(RUN).closed and "trying again" in lines[-1]
        coordinator.start()  # does not fail
        try:
            fill(coordinator, CensusKey(), "A", make_census()), fill(coordinator, CensusKey(), "B", make_census())
            wait_until(lambda: coordinator.state.registry.is_closed(CensusKey()))
            assert not store.load_events("model")
            monkeypatch.setattr(model_store, "keep_models", keep)
            wait_until(lambda: store.load_events("model"))
        finally:
            coordinator.stop()


def test_a_quorum_closes_a_round_at_its_deadline_after_a_restart(tmp_path):
    settings = make_settings(sites=("A", "B", "C"), num_epochs=1, quorum=2, deadline_s=0.2)
    with Store(tmp_path / "federation") as store:
        create_federation(store, settings, now=time.time())
        coordinator = Coordinator(store)
        for site in "ABC":
            fill(coordinator, RegistrationKey(RUN), site, make_registration(2 if site == "A" else 1))
        close_what_is_ready(coordinator)
        for site in "ABC":
            fill(coordinator, InitialKey(RUN), site, messages.Update(), make_weights(0) if site == "A" else {})
        close_what_is_ready(coordinator)
        for site in "AB":
            fill(coordinator, RoundKey(RUN, 0), site, messages.Update(), make_weights(1))
    with Store(tmp_path / "federation") as store:
        coordinator = Coordinator(store)
        coordinator.start()
        wait_until(lambda: coordinator.state.registry.is_closed(RoundKey(RUN, 0)))
        coordinator.stop()
        assert coordinator.state.registry.get(RoundKey(RUN, 0)).outcome.missing == ("C",)


def test_tensors_that_nobody_sends_keep_their_values(tmp_path):
    """Of a tensor whose only two sites both miss a round, the aggregate before is the best that is known."""
    shapes = {
        "A": {"stem.weight": (2,), "deep.weight": (2,)},
        "B": {"stem.weight": (2,), "deep.weight": (2,)},
        "C": {"stem.weight": (2,)},
        "D": {"stem.weight": (2,)},
    }
    now = 0.0
    settings = make_settings(sites=tuple("ABCD"), num_epochs=2, quorum=2, deadline_s=1)
    with Store(tmp_path / "federation") as store:
        create_federation(store, settings, now=time.time())
        coordinator = Coordinator(store, clock=lambda: now)
        for site in "ABCD":
            registration = make_registration(2 if site == "A" else 1, shapes[site], aliases={})
            fill(coordinator, RegistrationKey(RUN), site, registration)
        close_what_is_ready(coordinator)
        for site in "ABCD":
            values = {name: np.full(2, 5, np.float32) for name in shapes["A"]} if site == "A" else {}
            fill(coordinator, InitialKey(RUN), site, messages.Update(), values)
        close_what_is_ready(coordinator)
        for site in "CD":
            fill(coordinator, RoundKey(RUN, 0), site, messages.Update(), {"stem.weight": np.ones(2, np.float32)})
        now = 10.0
        close_what_is_ready(coordinator)
        with coordinator.state.documents.result(RoundKey(RUN, 0)) as aggregate:
            assert aggregate.read("stem.weight").tolist() == [1.0, 1.0]
            assert aggregate.read("deep.weight").tolist() == [5.0, 5.0]
            assert aggregate.message.missing == ("A", "B")
