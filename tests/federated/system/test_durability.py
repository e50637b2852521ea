"""What is acknowledged is on the disk; what breaks goes on at its byte; a full disk costs time and nothing else."""

import asyncio
import hashlib
import http.client
import json
import os
import subprocess
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

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
    served,
    train,
    wait_until,
)
from patience import MUCH_LONGER_S, PATIENCE_S

from nnunetv2.federated.coordinator.http import request_bodies
from nnunetv2.federated.coordinator.members import create_federation
from nnunetv2.federated.coordinator.notifier import Notifier
from nnunetv2.federated.coordinator.storage import partial_uploads
from nnunetv2.federated.coordinator.storage import store as store_module
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.exchanges.exchange import Closed, Contribution, with_contribution
from nnunetv2.federated.exchanges.steps import fresh_exchange, parse_key
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.document import TensorSpec, file_digest, write_document
from nnunetv2.federated.protocol.keys import CensusKey, InitialKey, RegistrationKey, RoundKey

LARGE = {"w": (1_500_000,)}
KEY = RoundKey(RUN, 0)


# ------------------------------------------------------------------------------------------------------------ tools
def begin_round_0(clients, shapes=LARGE) -> None:
    """Register sites for a run and agree on its initial weights."""
    values = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}

    def begin(client):
        match = client.exchange(RegistrationKey(RUN), make_registration(3, shapes, {})).message
        owned = {name for name, owner in match.initial_owner.items() if owner == client.credential.site}
        client.exchange(InitialKey(RUN), messages.Update(), {name: values[name] for name in owned})

    results = in_threads(*[lambda client=client: begin(client) for client in clients])
    assert not any(results), results


def write_update(path, seed=0, shapes=LARGE) -> str:
    rng = np.random.default_rng(seed)
    specs = {name: TensorSpec("F32", shape) for name, shape in shapes.items()}
    return write_document(
        path, messages.Update(), specs, (rng.normal(size=shape).astype(np.float32) for shape in shapes.values())
    )


@contextmanager
def request(url, token, method, path, *, headers=None, length=None):
    """Send the head of a request and yield the connection."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE_S)
    connection.putrequest(method, f"/v1/{path}")
    for name, value in {
        "Authorization": f"Bearer {token}",
        **(headers or {}),
        **({} if length is None else {"Content-Length": str(length)}),
    }.items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        yield connection
    finally:
        connection.close()


def offer(url, token, digest, size) -> dict:
    body = json.dumps({"digest": digest, "size": size}).encode()
    with request(url, token, "POST", f"offers/{KEY}", length=len(body)) as connection:
        connection.send(body)
        return json.loads(connection.getresponse().read())


# -------------------------------------------------------------------------------------------------- going on at a byte
def test_an_upload_and_a_download_go_on_at_their_byte_after_the_coordinator_was_killed(tmp_path):
    paths = {site: tmp_path / f"{site}.safetensors" for site in "AB"}
    digests = {site: write_update(path, ord(site)) for site, path in paths.items()}
    folder = tmp_path / "federation"
    with coordinator_process(folder, "--sites", "A", "B", "--epochs", "2", "--validate-every", "0") as process:
        credentials = process.credentials()
        tokens = {site: credential.token for site, credential in credentials.items()}
        with make_client(credentials["A"]) as a, make_client(credentials["B"]) as b:
            begin_round_0([a, b])
        content = paths["A"].read_bytes()
        half = len(content) // 2
        headers = {"X-Content-SHA256": digests["A"]}
        with request(
            process.url, tokens["A"], "PUT", f"gatherings/{KEY}", headers=headers, length=len(content)
        ) as connection:
            connection.send(content[:half])
            wait_until(lambda: sum(path.stat().st_size for path in (folder / "incoming").iterdir()) > half // 2)
            process.kill()
        process.start()
        offset = offer(process.url, tokens["A"], digests["A"], len(content))["offset"]
        assert half // 2 < offset <= half
        headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
        with request(
            process.url, tokens["A"], "PUT", f"gatherings/{KEY}", headers=headers, length=len(content) - offset
        ) as connection:
            connection.send(content[offset:])
            assert connection.getresponse().status == 200
        with (
            paths["B"].open("rb") as file,
            request(
                process.url,
                tokens["B"],
                "PUT",
                f"gatherings/{KEY}",
                headers={"X-Content-SHA256": digests["B"]},
                length=paths["B"].stat().st_size,
            ) as connection,
        ):
            connection.send(file)
            assert connection.getresponse().status == 200
        with request(process.url, tokens["A"], "GET", f"gatherings/{KEY}?wait=20") as connection:
            answer = connection.getresponse()
            digest = answer.getheader("X-Content-SHA256")
            beginning = answer.read(half)
            process.kill()
        process.start()
        with request(
            process.url,
            tokens["A"],
            "GET",
            f"gatherings/{KEY}",
            headers={"Range": f"bytes={half}-", "If-Range": f'"{digest}"'},
        ) as connection:
            answer = connection.getresponse()
            assert answer.status == 206
            assert hashlib.sha256(beginning + answer.read()).hexdigest() == digest


def test_a_file_that_takes_less_than_it_is_given_gets_all_of_it():
    class Reluctant:
        """A raw file on a disk that is almost full may do this."""

        def __init__(self):
            self.content = b""

        def write(self, piece):
            self.content += bytes(piece[:3])
            return len(piece[:3])

    file = Reluctant()
    partial_uploads._write_all(file, b"0123456789")
    assert file.content == b"0123456789"


# -------------------------------------------------------------------------------------------------- what is synced when
def test_a_document_is_synced_and_named_before_its_row_is(tmp_path, monkeypatch):
    order = []
    with Store(tmp_path / "federation") as store:
        create_federation(store, make_settings(), now=1.0)
        flush, transaction = store_module.flush_to_disk, store._database.transaction
        monkeypatch.setattr(store_module, "flush_to_disk", lambda path: (order.append(path.name), flush(path)))
        monkeypatch.setattr(store._database, "transaction", lambda: (order.append("row"), transaction())[1])
        for site in "AB":
            incoming = store.folder / "incoming" / f"upload-{site}"
            incoming.write_bytes(b"x")
            exchange = with_contribution(
                fresh_exchange(parse_key(KEY), make_settings()), site, Contribution("0" * 64, 1, 2.0)
            )
            store.save_contribution(exchange, site, incoming)
        store.save_subset(KEY, "1" * 64, "2" * 64)
    assert order == [
        "upload-A",
        "0",
        "rounds",
        RUN,
        "runs",
        "gatherings",
        "federation",
        "row",
        "upload-B",
        "0",
        "row",  # the folders above have their names by now
        "0",
        "row",
    ]


def test_a_start_looks_at_files_and_not_at_all_that_ever_was(tmp_path, monkeypatch):
    with Store(tmp_path / "federation") as store:
        create_federation(store, make_settings(), now=1.0)
        for number in range(20):
            exchange = fresh_exchange(parse_key(RoundKey(RUN, number)), make_settings())
            for site in "AB":
                (incoming := incoming_path(store)).write_bytes(b"x")
                exchange = with_contribution(exchange, site, Contribution("0" * 64, 1, 2.0))
                store.save_contribution(exchange, site, incoming)
            (store.result_path(exchange.key)).write_bytes(b"r")
            store.save_closing(
                fresh_exchange(exchange.key, make_settings()).__class__(
                    **{**exchange.__dict__, "outcome": Closed(3.0, ("A", "B"))}
                ),
                "1" * 64,
            )
            if number < 18:
                store.delete_contributions(exchange.key)
                store.delete_results(exchange.key)
        (store.result_folder(RoundKey(RUN, 19)) / "C.000.safetensors").write_bytes(b"orphan")
    looked_at, known = [], Store._known_files
    monkeypatch.setattr(Store, "_known_files", lambda self, key: (looked_at.append(key), known(self, key))[1])
    with Store(tmp_path / "federation") as store:
        assert store.rounds_with_files(RUN) == [18, 19]
        assert sorted(path.name for path in store.result_folder(RoundKey(RUN, 19)).iterdir()) == [
            f"A.{'0' * 24}.safetensors",
            f"B.{'0' * 24}.safetensors",
            "result.safetensors",
        ]
    assert sorted(looked_at) == [RoundKey(RUN, 18), RoundKey(RUN, 19)]


# -------------------------------------------------------------------------------------------------------- a full disk
def test_a_full_database_is_trouble_and_no_loss(tmp_path):
    """SQLite's own limit of pages fails in the same place and way as a full disk."""
    with Store(tmp_path / "federation") as store:
        create_federation(store, make_settings(), now=1.0)
        connection = store._database._connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        before = store.load_log()
        with pytest.raises(OSError, match="disk is full"):
            for number in range(100):
                store.save_meta(f"name{number}", "x" * 10_000)
        assert store.load_log() == before
        connection.execute("PRAGMA max_page_count = 1000000")
        store.save_meta("name", "value")
        assert store.load_meta("name") == "value"


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if os.name == "posix"
        else None
    )
    if mount is None or mount.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_again_and_again_costs_time_only(small_disk, tmp_path, monkeypatch):
    from nnunetv2.federated.coordinator import aggregation_worker
    from nnunetv2.federated.coordinator.storage import quotas

    monkeypatch.setattr(quotas, "RESERVED_BYTES", 0)  # else uploads are put off before the disk is full
    monkeypatch.setattr(aggregation_worker, "RETRY_CLOSING_S", 0.2)
    shapes, filler = {"w": (500_000,)}, small_disk / "filler"
    over = threading.Event()

    def fill_and_free():
        while not over.is_set():
            # Unbuffered, since closing a file would write once more what did not fit.
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while not over.is_set():
                    file.write(bytes(1 << 18))
            over.wait(0.3)
            filler.unlink(missing_ok=True)
            over.wait(0.3)

    def digest_of_run(folder) -> str:
        with served(folder, make_settings(num_epochs=4, validate_every=0)) as federation:

            def site(name, seed):
                with federation.client(name) as client:
                    return large_training(client, seed)

            federation.credential("A"), federation.credential("B")
            thread = threading.Thread(target=fill_and_free)
            if folder.is_relative_to(small_disk):
                thread.start()
            try:
                results = in_threads(lambda: site("A", 1), lambda: site("B", 2))
            finally:
                over.set()
                if thread.ident:
                    thread.join()
            assert results[0] == results[1], results
            assert [len(record["sites"]) for record in federation.state.store.load_rounds(RUN)] == [2] * 4
            return results[0]

    def large_training(client, seed):
        site = client.credential.site
        match = client.exchange(RegistrationKey(RUN), make_registration(3, shapes, {})).message
        own = {"w": np.ones(shapes["w"], np.float32)} if match.initial_owner["w"] == site else {}
        document = client.exchange(InitialKey(RUN), messages.Update(), own)
        for number in range(4):
            update = {"w": document.read("w") * np.float32(0.5) + np.float32(seed + number)}
            document = client.exchange(RoundKey(RUN, number), messages.Update(), update)
        return file_digest(document.path)

    assert digest_of_run(small_disk / "federation") == digest_of_run(tmp_path / "undisturbed")


# ------------------------------------------------------------------------------------------------------- many at once
def test_uploads_that_are_being_synced_do_not_keep_others_from_being_served(tmp_path, monkeypatch):
    sites = tuple(f"S{index:02d}" for index in range(60))
    release = threading.Event()
    with served(tmp_path / "federation", make_settings(sites=sites)) as federation:
        contribute, held = federation.coordinator.contribute, []

        def hold(*arguments):
            held.append(arguments)
            assert release.wait(MUCH_LONGER_S)
            return contribute(*arguments)

        monkeypatch.setattr(federation.coordinator, "contribute", hold)
        clients = [federation.client(site) for site in sites]
        threads = [
            threading.Thread(target=client.contribute, args=(CensusKey(), make_census()), daemon=True)
            for client in clients
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(held) == request_bodies.FINISHING_THREADS)
        with federation.client(sites[0]) as other:
            other.status()
        assert not federation.state.registry.is_closed(CensusKey())
        release.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        wait_until(lambda: federation.state.registry.is_closed(CensusKey()))
        for client in clients:
            client.close()


def test_progress_wakes_those_who_wait_at_a_bounded_rate_and_the_end_at_once(monkeypatch):
    async def scenario():
        notifier, woken = Notifier(), []
        notifier.bind()

        async def wait(index):
            with notifier.waiting("key") as change:
                await change.wait()
                woken.append(index)

        async def everybody():
            tasks = [asyncio.create_task(wait(index)) for index in range(20)]
            await asyncio.sleep(0)
            return tasks

        tasks = await everybody()
        for _ in range(100):
            notifier.notify_progress("key")
        assert woken == []
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
        assert len(woken) == 20
        monkeypatch.setattr("nnunetv2.federated.coordinator.notifier.PROGRESS_PER_S", 20 / MUCH_LONGER_S)
        tasks = await everybody()
        notifier.notify_progress("key")
        await asyncio.sleep(0.1)
        assert len(woken) == 20  # the others' turn comes much later
        notifier.notify("key")
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
        assert not notifier._waiting and len(woken) == 40

    asyncio.run(scenario())


# ------------------------------------------------------------------------------------------------------- conspicuous
def test_an_update_that_moves_far_is_counted_and_announced(tmp_path):
    sites = ("A", "B", "C", "D")
    with served(tmp_path / "federation", make_settings(sites=sites, num_epochs=1, validate_every=0)) as federation:

        def site(name, seed):
            with federation.client(name) as client:
                return train(client, seed=seed, num_rounds=1)

        results = in_threads(
            *[lambda name=name, seed=seed: site(name, seed) for name, seed in zip(sites, (1, 1, 1, 500))]
        )
        assert len(set(results)) == 1
        store = federation.state.store
        (record,) = store.load_rounds(RUN)
        assert (record["outliers"], sorted(record["sites"])) == (["D"], list(sites))
        (event,) = store.load_events("outlier")
        assert (event.site, event.key) == ("D", KEY)
        assert event.detail["change_norm"] == record["sites"]["D"]["change_norm"] > 1000
        assert record["sites"]["A"]["change_norm"] == pytest.approx(record["sites"]["A"]["change_rms"] * np.sqrt(24))
        wait_until(
            lambda: any("the update of site D moves" in line and "it was counted" in line for line in federation.lines)
        )
