"""A federation that is saved while it is at work goes on elsewhere with the same bytes."""

import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace

import pytest
from fake_federation import (
    PROJECT,
    coordinator_process,
    in_threads,
    make_client,
    make_settings,
    served,
    train,
    wait_until,
)
from patience import PATIENCE_S

from nnunetv2.federated.commands.admin import main
from nnunetv2.federated.coordinator.storage import backup as backup_module
from nnunetv2.federated.coordinator.storage.backup import CONTENTS_FILE, backup, restore
from nnunetv2.federated.errors import FederationError

NUM_ROUNDS = 6


def run_on(url: str, credentials: dict, on_round=lambda number: None) -> set[str]:
    """Let two sites train to the end of the run; return the digests of the last aggregate."""

    def site(name, seed):
        with make_client(replace(credentials[name], url=url)) as client:
            return train(client, seed=seed, num_rounds=NUM_ROUNDS, pause_s=0.03, on_round=on_round)

    results = in_threads(lambda: site("A", 1), lambda: site("B", 2))
    assert all(isinstance(one, str) for one in results), results
    return set(results)


@pytest.mark.slow
def test_a_run_that_was_saved_at_work_goes_on_elsewhere_to_the_same_digest(tmp_path, capsys):
    file, elsewhere = tmp_path / "backup.tar", tmp_path / "new" / "federation"
    middle = threading.Event()
    with coordinator_process(
        tmp_path / "federation", "--sites", "A", "B", "--epochs", str(NUM_ROUNDS), "--validate-every", "0"
    ) as process:
        credentials = process.credentials()

        def save():
            assert middle.wait(PATIENCE_S)
            return main(["--folder", str(tmp_path / "federation"), "backup", str(file)])

        digests, status = in_threads(
            lambda: run_on(process.url, credentials, lambda number: middle.set() if number == 2 else None), save
        )
        assert (status, len(digests)) == (0, 1)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list((tmp_path / "federation").glob(".backup-*"))
    assert main(["restore", str(file), str(elsewhere)]) == 0
    assert "nnUNetv2_fed_coordinator --folder" in capsys.readouterr().out
    with coordinator_process(elsewhere) as process:
        with make_client(replace(credentials["A"], url=process.url)) as client:
            assert not client.run_state("3d_fullres.fold_0.nnUNetTrainerFake").closed
        assert run_on(process.url, credentials) == digests


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a federation whose run is over, with models."""
    with served(tmp_path / "federation", make_settings(num_epochs=1, validate_every=0)) as federation:

        def site(name, seed):
            with federation.client(name) as client:
                return train(client, seed=seed, num_rounds=1)

        in_threads(lambda: site("A", 1), lambda: site("B", 2))
        wait_until(lambda: federation.state.store.load_events("model"))
    return tmp_path / "federation"


def test_what_is_restored_is_what_was_saved(folder, tmp_path):
    saved = backup(folder, tmp_path / "b.tar")
    assert restore(tmp_path / "b.tar", tmp_path / "again") == saved
    names = {
        path.relative_to(tmp_path / "again").as_posix() for path in (tmp_path / "again").rglob("*") if path.is_file()
    }
    assert names == set(saved.files)
    assert any(name.startswith("models/") and name.endswith("checkpoint_final.pth") for name in names)
    assert not names & {"lock", "coordinator.json", "operator.json"}
    for name in names - {"coordinator.sqlite"}:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_what_a_killed_restore_has_left_goes_with_a_later_one(folder, tmp_path):
    backup(folder, tmp_path / "b.tar")
    target = tmp_path / "there" / "a [b]"
    code = (
        "import os, sys; from pathlib import Path; from nnunetv2.federated.coordinator.storage import backup\n"
        "backup._check = lambda *_: os.kill(os.getpid(), 9)\n"
        "backup.restore(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "b.tar"), str(target)], cwd=PROJECT)
    old, young = target.parent.iterdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    others = target.parent / f".{target.name}-of-somebody-else"
    others.mkdir()
    os.utime(others, (1.0, 1.0))
    restore(tmp_path / "b.tar", target)
    assert sorted(target.parent.iterdir()) == sorted([young, others, target])


def test_a_backup_is_not_written_over(folder, tmp_path):
    backup(folder, tmp_path / "b.tar")
    with pytest.raises(FileExistsError, match="choose another name"):
        backup(folder, tmp_path / "b.tar")
    with pytest.raises(FederationError, match="is not empty"):
        restore(tmp_path / "b.tar", folder)


def test_a_document_that_goes_while_it_is_listed_makes_the_backup_look_again(folder, tmp_path, monkeypatch):
    link, calls = backup_module._link, []

    def link_once_in_vain(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise backup_module._DeletedError(source)
        link(source, target)

    monkeypatch.setattr(backup_module, "_link", link_once_in_vain)
    saved = backup(folder, tmp_path / "b.tar")
    assert restore(tmp_path / "b.tar", tmp_path / "again") == saved


def test_a_damaged_document_is_noticed_when_it_is_saved(folder, tmp_path):
    path = next((folder / "gatherings").rglob("rounds/0/result.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FederationError, match="result.safetensors is damaged"):
        backup(folder, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_a_damaged_or_foreign_file_is_not_restored(folder, tmp_path):
    backup(folder, tmp_path / "b.tar")
    content = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(content[: len(content) // 2])
    changed = bytearray(content)
    changed[700] ^= 1  # in the first file
    (tmp_path / "changed.tar").write_bytes(changed)
    (tmp_path / "text.tar").write_text("no tar at all")
    for name in ("short", "changed", "text"):
        with pytest.raises(FederationError, match="damaged|cut off|no backup"):
            restore(tmp_path / f"{name}.tar", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir() if "again" in path.name) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "C:\\outside"])
def test_paths_outside_of_the_folder_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for entry, content in ((name, b"x"), (CONTENTS_FILE, json.dumps({"version": 1}).encode())):
            information = tarfile.TarInfo(entry)
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))
    with pytest.raises(FederationError, match="does not belong into a backup"):
        restore(tmp_path / "evil.tar", tmp_path / "sub" / "again")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "sub" / "outside").exists()


def test_a_link_in_a_backup_is_refused(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        information = tarfile.TarInfo("models")
        information.type, information.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(information)
    with pytest.raises(FederationError, match="does not belong"):
        restore(tmp_path / "evil.tar", tmp_path / "again")
