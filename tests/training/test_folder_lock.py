import os

import pytest

from nnunetv2.training.folder_lock import training_in

fcntl = pytest.importorskip("fcntl")


def test_a_second_training_in_a_folder_is_refused_and_told_of_the_first(tmp_path):
    with training_in(tmp_path), pytest.raises(RuntimeError, match=f"process {os.getpid()} on"), training_in(tmp_path):
        pass


def test_a_folder_is_free_again_afterwards_and_nothing_stays(tmp_path):
    for _ in range(2):
        with training_in(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_the_lock_file_of_a_process_that_died_does_not_matter(tmp_path):
    (tmp_path / ".training.lock").write_text("process 1 on nowhere\n")
    with training_in(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".training.lock").read_text()


def test_what_a_killed_training_was_writing_is_removed(tmp_path):
    (tmp_path / ".partial-x").mkdir()
    (tmp_path / ".partial-x" / "checkpoint_latest.pth").write_text("half")
    with training_in(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".training.lock"]


def test_what_another_training_is_writing_stays(tmp_path):
    with training_in(tmp_path):
        (tmp_path / ".partial-x").mkdir()
        with pytest.raises(RuntimeError, match="another training"), training_in(tmp_path):
            pass
        assert (tmp_path / ".partial-x").is_dir()


def test_file_systems_without_locks_are_accepted(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with training_in(tmp_path), training_in(tmp_path):
        pass
