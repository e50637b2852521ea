"""Workers that draw batches."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from patience import MUCH_LONGER_S, PATIENCE_S

from nnunetv2.training.data_augmentation import augmenters
from nnunetv2.training.data_augmentation.augmenters import WorkerAugmenter, build_augmenters
from nnunetv2.training.data_augmentation.numbered_batches import seed_generators
from nnunetv2.utilities.command_line import describe_error
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


class Draws:
    """Yields one number of each generator and the process it was drawn in."""

    def __next__(self) -> dict:
        time.sleep(0.005)  # so that every worker gets a turn
        draws = [np.random.uniform(), torch.rand(1).item(), random.random()]
        return {
            "draws": torch.tensor(draws, dtype=torch.float64),
            "worker": os.getpid(),
            "threads": torch.get_num_threads(),
            "target": [torch.zeros(2), torch.zeros(1)],
        }


class Fails:
    def __next__(self) -> dict:
        raise ValueError("the third slice is upside down")


class Constant:
    """Yields the same value again and again."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __next__(self) -> dict:
        return {"value": self.value}


class RaisesWhenRebuilt:
    """Raises an error in the process that receives it."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __reduce__(self):
        return raise_on_arrival, (self.error,)


def raise_on_arrival(error: type[Exception]) -> None:
    raise error("on arrival")


class Dies:
    def __next__(self) -> dict:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def start():
    """Build augmenters and shut them down in the end."""
    started = []

    def build(loader, num_processes=2, **options) -> WorkerAugmenter:
        started.append(WorkerAugmenter(loader, None, num_processes, num_cached=4, **options))
        return started[-1]

    yield build
    for augmenter in started:
        augmenter._finish()


def first_of_each_worker(augmenter, number: int) -> list[dict]:
    firsts = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(firsts) < number and time.monotonic() < deadline:
        batch = next(augmenter)
        firsts.setdefault(batch["worker"], batch)
    return list(firsts.values())


def test_workers_draw_different_numbers_from_every_generator(start):
    first, second = first_of_each_worker(start(Draws()), 2)
    assert (first["draws"] != second["draws"]).all()
    assert len(set(first["draws"].tolist())) == 3
    assert first["threads"] == 1


def test_seeds_repeat_what_a_worker_draws(start):
    draws = [next(start(Draws(), num_processes=1, seeds=[7]))["draws"] for _ in range(2)]
    assert torch.equal(*draws)


def test_seeding_reaches_all_generators():
    def draw():
        seed_generators([3, 1])
        return np.random.uniform(), torch.rand(1).item(), random.random()

    assert draw() == draw()


def test_an_error_in_a_worker_arrives_with_its_text_and_a_hint(start):
    augmenter = start(Fails())
    with pytest.raises(RuntimeError, match="(?s)upside down.*nnUNet_n_proc_DA.*shm-size") as caught:
        next(augmenter)
    assert not augmenter.initialized
    line = describe_error(caught.value)
    assert line.startswith("augmentation-") and "Traceback" not in line
    assert "Traceback (most recent call last)" in str(caught.value.__cause__), "for those who debug"


@pytest.mark.parametrize("error", [MemoryError, pickle.UnpicklingError, ValueError])
def test_a_batch_that_cannot_be_received_ends_the_wait_for_it(start, error):
    augmenter = start(Constant(RaisesWhenRebuilt(error)), num_processes=1)
    with pytest.raises(RuntimeError, match=f"a batch could not be received: {error.__name__}: on arrival") as caught:
        next(augmenter)
    assert "in raise_on_arrival" in str(caught.value.__cause__)


def test_a_thread_that_has_ended_is_noticed(start, monkeypatch):
    monkeypatch.setattr(augmenters, "_forward", lambda *channels: None)
    with pytest.raises(RuntimeError, match="No cause was reported"):
        next(start(Draws()))


def test_a_dead_worker_is_noticed_and_explained(start):
    with pytest.raises(RuntimeError, match="memory ran out"):
        next(start(Dies()))


def test_a_worker_that_dies_is_noticed_while_others_go_on(start):
    augmenter = start(Draws())
    next(augmenter)
    os.kill(augmenter._processes[0].pid, signal.SIGKILL)
    augmenter._processes[0].join(PATIENCE_S)
    with pytest.raises(RuntimeError, match="augmentation-0 ended with exit status -9"):
        next(augmenter)


def test_shutdown_leaves_no_process_and_a_restart_works(start):
    augmenter = start(Draws())
    next(augmenter)
    processes = augmenter._processes
    augmenter._finish()
    assert not any(process.is_alive() for process in processes)
    assert "draws" in next(augmenter)


def test_without_workers_batches_are_drawn_here():
    train, val = build_augmenters(Draws(), Draws(), num_processes=0, pin_memory=False)
    assert isinstance(train, SingleThreadedAugmenter) and isinstance(val, SingleThreadedAugmenter)
    seed_generators(1)
    first = next(train)["draws"]
    seed_generators(1)
    assert torch.equal(next(train)["draws"], first)


@pytest.mark.parametrize(
    ("number", "train", "val"), [(1, (1, 6), (1, 3)), (12, (12, 6), (6, 3)), (28, (28, 14), (14, 7))]
)
def test_validation_gets_half_as_many_workers(number, train, val):
    built = build_augmenters(Draws(), Draws(), num_processes=number, pin_memory=False)
    assert [(a.num_processes, a.num_cached) for a in built] == [train, val]
    assert all(isinstance(a, NonDetMultiThreadedAugmenter) for a in built)


def take(augmenter, number: int) -> list[torch.Tensor]:
    return [next(augmenter)["draws"] for _ in range(number)]


@pytest.mark.slow
def test_with_a_seed_any_number_of_workers_gives_the_same_batches_in_the_same_order():
    expected = None
    for number in (0, 1, 2, 3):
        train, val = build_augmenters(Draws(), Draws(), num_processes=number, pin_memory=False, entropy=(5, 0))
        drawn = [take(train, 8), take(val, 5)]
        for augmenter in (train, val):
            if number:
                augmenter._finish()
        drawn = torch.stack(drawn[0] + drawn[1])
        expected = drawn if expected is None else expected
        assert torch.equal(drawn, expected), number
    assert len(expected.unique()) == expected.numel()  # no two batches, no two generators are alike


def test_a_run_goes_on_where_another_one_stopped(start):
    whole = take(start(Draws(), num_processes=2, entropy=(7,)), 9)
    rest = take(start(Draws(), num_processes=3, entropy=(7,), first_batch=4), 5)
    assert torch.equal(torch.stack(whole[4:]), torch.stack(rest))


def test_seeded_batches_leave_the_numbers_of_the_training_alone():
    train, _ = build_augmenters(Draws(), Draws(), num_processes=0, pin_memory=False, entropy=(5,))
    seed_generators(1)
    expected = np.random.uniform(), torch.rand(1).item(), random.random()
    seed_generators(1)
    next(train)
    assert (np.random.uniform(), torch.rand(1).item(), random.random()) == expected


def test_a_dead_worker_is_noticed_when_batches_come_in_turn(start):
    with pytest.raises(RuntimeError, match="memory ran out"):
        next(start(Dies(), entropy=(1,)))


class DiesOfFullSharedMemory:
    def __next__(self) -> dict:
        faulthandler.disable()  # pytest's, which reports every thread
        os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.slow
def test_full_shared_memory_is_explained(start, monkeypatch):
    with pytest.raises(RuntimeError, match="(?s)/dev/shm.*--shm-size"):
        next(start(DiesOfFullSharedMemory()))

    def no_space(tensor):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", no_space)
    with pytest.raises(RuntimeError, match="(?s)No space left on device.*--shm-size"):
        next(start(Draws()))


@pytest.mark.slow
def test_workers_can_be_spawned(start, monkeypatch):
    """As on Windows and macOS: the loader travels as a pickle."""
    monkeypatch.setattr(augmenters, "choose_start_method", lambda: "spawn")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    batch = next(start(Draws(), num_processes=1))
    assert batch["worker"] != os.getpid()


def _ask_and_wait(connection) -> None:
    augmenter = WorkerAugmenter(Draws(), None, 1, num_cached=1)
    next(augmenter)
    connection.send(augmenter._processes[0].pid)
    time.sleep(MUCH_LONGER_S)


def test_workers_end_when_the_process_that_started_them_is_killed():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    starter = context.Process(target=_ask_and_wait, args=(there,))
    starter.start()
    assert here.poll(PATIENCE_S)
    worker = here.recv()
    os.kill(starter.pid, signal.SIGKILL)
    starter.join(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and _is_running(worker):
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("text", ["many", "-1", "2.5", ""])
def test_a_number_of_workers_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("nnUNet_n_proc_DA", text)
    with pytest.raises(ValueError, match="nnUNet_n_proc_DA is"):
        get_allowed_n_proc_DA()
