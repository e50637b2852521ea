import pickle
import threading

import pytest

from nnunetv2.training.background_writer import BackgroundWriter, WriteError


def test_tasks_run_in_order_beside_the_caller():
    writer, done, caller = BackgroundWriter(), [], threading.get_ident()
    for number in range(5):
        writer.submit(f"file {number}", lambda n: done.append((n, threading.get_ident())), number)
    writer.wait()
    assert [number for number, _ in done] == list(range(5)) and all(thread != caller for _, thread in done)


def test_a_waiting_task_gives_way_to_a_newer_one_of_its_name():
    writer, done, gate = BackgroundWriter(), [], threading.Event()
    writer.submit("gate", gate.wait, 10)
    for name, value in (("best", 1), ("latest", 1), ("best", 2), ("best", 3)):
        writer.submit(name, done.append, (name, value))
    gate.set()
    writer.wait()
    assert done == [("best", 3), ("latest", 1)]


def fail():
    raise OSError(28, "No space left on device")


def test_a_failure_is_raised_once_and_names_the_file_and_the_cause():
    writer, done = BackgroundWriter(), []
    writer.submit("checkpoint_best.pth", fail)
    writer.submit("another", done.append, 1)
    writer.wait()
    with pytest.raises(WriteError, match="checkpoint_best.pth.*No space left on device.*--c"):
        writer.raise_failure()
    writer.raise_failure()
    assert done == [1]


def test_a_failed_picture_is_only_logged(caplog):
    writer = BackgroundWriter()
    writer.submit("examples.png", fail, is_vital=False)
    writer.wait()
    writer.raise_failure()
    assert "could not write examples.png" in caplog.text


def test_waiting_for_nothing_returns_at_once_and_no_thread_is_left():
    before = threading.active_count()
    writer = BackgroundWriter()
    writer.wait()
    writer.submit("x", int)
    writer.wait()
    assert threading.active_count() == before
    assert isinstance(pickle.loads(pickle.dumps(writer)), BackgroundWriter)
