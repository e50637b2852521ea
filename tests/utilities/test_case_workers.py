import multiprocessing
import operator
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from patience import PATIENCE_S

from nnunetv2.utilities.case_workers import CaseFailedError, process_cases


def write(folder: Path, name: str) -> None:
    (folder / name).write_text(str(os.getpid()))


def fail(name: str) -> None:
    raise KeyError(f"no voxel in {name}")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_silently() -> None:
    os._exit(3)


def act(action: str, folder: Path) -> None:
    {"write": partial(write, folder, "done"), "fail": partial(fail, "it"), "kill": be_killed, "exit": exit_silently}[
        action
    ]()


def test_one_process_works_here(tmp_path):
    cases = {name: (tmp_path, name) for name in "ab"}
    assert list(process_cases(write, cases, 1)) == [("a", None), ("b", None)]
    assert (tmp_path / "a").read_text() == str(os.getpid())


def test_workers_share_the_cases(tmp_path):
    cases = {name: (tmp_path, name) for name in "abcde"}
    assert sorted(name for name, _ in process_cases(write, cases, 2)) == list("abcde")
    processes = {(tmp_path / name).read_text() for name in cases}
    assert str(os.getpid()) not in processes
    assert len(processes) <= 2


@pytest.mark.parametrize("num_processes", [1, 2])
def test_results_come_with_their_case(num_processes):
    cases = {name: (name, 2) for name in "abc"}
    assert dict(process_cases(operator.mul, cases, num_processes)) == {"a": "aa", "b": "bb", "c": "cc"}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_names_its_case(num_processes):
    with pytest.raises(CaseFailedError, match="case patient_[78]: KeyError: 'no voxel in it'") as caught:
        list(process_cases(fail, {"patient_7": ("it",), "patient_8": ("it",)}, num_processes))
    assert "no voxel in it" in str(caught.value.__cause__)


@pytest.mark.parametrize(("action", "reason"), [("kill", "memory ran out"), ("exit", "exit code 3")])
def test_a_dead_worker_is_noticed_and_its_case_named(tmp_path, action, reason):
    cases = {"large": (action, tmp_path), "small": ("write", tmp_path)}
    with pytest.raises(CaseFailedError, match=rf"case large: the worker process .*{reason}"):
        list(process_cases(act, cases, 2))


def test_nonsense_numbers_of_processes_are_refused():
    with pytest.raises(ValueError, match="got 0"):
        list(process_cases(write, {}, 0))


def test_no_cases_are_done_at_once():
    assert list(process_cases(write, {}, 4)) == []


def note_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def work_until_killed(folder: Path) -> None:
    list(process_cases(note_and_sleep, {"a": (folder,), "b": (folder,)}, 2))


def test_workers_end_with_their_parent_in_the_middle_of_a_case(tmp_path):
    parent = multiprocessing.get_context("spawn").Process(target=work_until_killed, args=(tmp_path,))
    parent.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.join()
    workers = [int(file.name) for file in tmp_path.iterdir()]
    wait_until(lambda: not any(map(is_running, workers)))


def is_running(pid: int) -> bool:
    """Tell whether a process is there and not merely waiting to be asked for its exit code."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
