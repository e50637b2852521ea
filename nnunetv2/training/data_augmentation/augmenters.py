"""Run data loaders in worker processes or in this one.

A worker that fails is noticed at once.

The flow of batches:

    workers --- process queue ---> forwarding thread (pins memory) --- short thread queue ---> next()

batchgenerators offers the same. These workers differ in that each draws random numbers of its own, from numpy, torch
and Python, in that a failure is raised with its cause where the batch was asked for, and in that nobody polls fast.
With a seed, batches also come in a fixed order: worker w of n draws the batches w, w + n, w + 2n, ...
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import queue
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import (
    NonDetMultiThreadedAugmenter,
    pin_memory_of_all_eligible_items_in_dict,
)
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

from nnunetv2.training.data_augmentation.numbered_batches import NumberedBatches, QueuesInTurn, seed_generators
from nnunetv2.utilities.plain_text import log_plainly
from nnunetv2.utilities.worker_traceback import WorkerTracebackError

REACTION_TIME_S = 0.2
"""How long anyone waits before looking whether the others still live. Batches are handed over without this delay."""
NUM_READY_BATCHES = 2
MAX_REPORT_LENGTH = 8000  # well below the capacity of a pipe without a reader

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT_ARRAY, LARGEST_KEPT_HEAP = 32 * 2**20, 512 * 2**20  # bytes; glibc allows no more than the first

FAILURE_HINT = (
    "If memory ran out, use fewer workers (environment variable nnUNet_n_proc_DA, 0 for none). In a container, allow "
    "more shared memory, say docker run --ipc=host or --shm-size=8g. After 'Too many open files', raise `ulimit -n`."
)
SIGNALS = {
    -9: "killed by the system, usually because memory ran out",
    -7: "bus error, usually because shared memory (/dev/shm) is full",
    -11: "segmentation fault",
    -15: "terminated",
}


def build_augmenters(
    train_loader: Iterator[dict],
    val_loader: Iterator[dict],
    *,
    num_processes: int,
    pin_memory: bool,
    entropy: Sequence[int] | None = None,
    first_batches: tuple[int, int] = (0, 0),
) -> tuple[Iterator[dict], Iterator[dict]]:
    """Build the iterators of training and validation batches; validation gets half as many workers.

    Args:
        num_processes: Workers for training. With 0 both loaders run in this process.
        pin_memory: Put batches into page-locked memory, for a GPU.
        entropy: Whole numbers to seed with. Every batch then depends on them and on its number alone, not on the number
            of workers. By default all batches are different each time.
        first_batches: Numbers of the first batch of training and of validation, to go on where another run stopped;
            used with `entropy`.
    """
    if num_processes == 0:
        loaders = [train_loader, val_loader]
        if entropy is not None:
            loaders = [
                NumberedBatches(loader, (*entropy, stream), first=first)
                for stream, (loader, first) in enumerate(zip(loaders, first_batches))
            ]
        return SingleThreadedAugmenter(loaders[0], None), SingleThreadedAugmenter(loaders[1], None)
    sizes = ((num_processes, max(6, num_processes // 2)), (max(1, num_processes // 2), max(3, num_processes // 4)))
    training, validation = (
        WorkerAugmenter(
            loader,
            None,
            number,
            num_cached=num_cached,
            pin_memory=pin_memory,
            wait_time=0.002,
            entropy=None if entropy is None else (*entropy, stream),
            first_batch=first,
        )
        for stream, (loader, (number, num_cached), first) in enumerate(
            zip((train_loader, val_loader), sizes, first_batches)
        )
    )
    return training, validation


class _Channels(NamedTuple):
    """The queues and events that a worker shares with its starting process."""

    batches: Any
    failures: Any
    abort: Any
    pause: Any


class WorkerAugmenter(NonDetMultiThreadedAugmenter):
    """Draw batches in worker processes, in no particular order unless `entropy` is given.

    Workers start when the first batch is asked for, and end with `_finish()` or with the process that started them.

    Args:
        data_loader: Anything that yields batches forever. Where processes are not forked (Windows, macOS) it is
            pickled.
        transform: Called as `transform(**batch)`; usually None, as loaders transform their samples themselves.
        num_processes: Number of workers.
        num_cached: Batches that may wait for this process.
        seeds: One per worker, to repeat its batches. By default each takes its numbers from the system's entropy.
        pin_memory: Put batches into page-locked memory, for a GPU.
        wait_time: As in batchgenerators; only its shutdown uses it.
        entropy: Whole numbers to seed with. Batches are then the same, in the same order, for any number of workers.
        first_batch: Number of the first batch, with `entropy`.
    """

    def __init__(
        self,
        data_loader: Iterator[dict],
        transform: Any,
        num_processes: int,
        num_cached: int = 2,
        seeds: Sequence[int] | None = None,
        pin_memory: bool = False,
        wait_time: float = 0.02,
        *,
        entropy: Sequence[int] | None = None,
        first_batch: int = 0,
    ) -> None:
        super().__init__(data_loader, transform, num_processes, num_cached, seeds, pin_memory, wait_time)
        self._entropy, self._first_batch = entropy, first_batch

    def start(self) -> None:
        """Start the workers early, so that the first batch is on its way."""
        self._start()

    def _start(self) -> None:
        """Start workers and the thread that fetches their batches."""
        if self.initialized:
            return
        context: Any = multiprocessing.get_context(choose_start_method())
        self.abort_event, self.pause_event = context.Event(), context.Event()
        self._failures, self.results_loop_queue = context.SimpleQueue(), queue.Queue(NUM_READY_BATCHES)
        queues, loaders = self._build_queues_and_loaders(context)
        entropies = [np.random.SeedSequence(seed).entropy for seed in self.seeds]
        self._processes = [
            context.Process(
                target=_produce,
                daemon=True,
                name=f"augmentation-{worker}",
                args=(
                    _Channels(batches, self._failures, self.abort_event, self.pause_event),
                    loader,
                    self.transform,
                    worker,
                    entropy,
                ),
            )
            for worker, (batches, loader, entropy) in enumerate(zip(queues, loaders, entropies))
        ]
        with warnings.catch_warnings():
            # Python 3.12 and later warn of forks beside threads. The workers use one thread and none of ours.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            for process in self._processes:
                process.start()
        gpu = torch.cuda.current_device() if self.pin_memory and torch.cuda.is_available() else None
        self.results_loop_thread = threading.Thread(
            target=_forward,
            args=(
                _Channels(self._queue, self._failures, self.abort_event, self.pause_event),
                self.results_loop_queue,
                gpu,
            ),
            daemon=True,
            name="augmentation-results",
        )
        self.results_loop_thread.start()
        self.initialized = True

    def _build_queues_and_loaders(self, context: Any) -> tuple[list, list]:
        """Return the queue and the loader of each worker: one for all, or one each where the order is fixed."""
        number = self.num_processes
        if self._entropy is None:
            self._queue = context.Queue(self.num_cached)
            return [self._queue] * number, [self.generator] * number
        self._queue = QueuesInTurn([context.Queue(max(1, self.num_cached // number)) for _ in range(number)])
        loaders = [
            NumberedBatches(self.generator, self._entropy, first=self._first_batch + worker, step=number)
            for worker in range(number)
        ]
        return self._queue.queues, loaders

    def __next__(self) -> dict:
        """Return a batch.

        Raises:
            RuntimeError: A worker failed or died, or a batch could not be received. The workers are shut down; the
                message has the cause.
        """
        if not self.initialized:
            self._start()
        while True:
            # Looked at before each batch: while the other workers deliver, a dead one would go unnoticed for long.
            is_over = self.abort_event.is_set() or not self.results_loop_thread.is_alive()
            if is_over or self._wait_for_exit(timeout_s=0):
                self._raise_failure()
            try:
                return self.results_loop_queue.get(timeout=REACTION_TIME_S)
            except queue.Empty:
                continue

    def _wait_for_exit(self, timeout_s: float) -> bool:
        """Wait until some worker has ended; return whether one has."""
        return bool(multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout_s))

    def _raise_failure(self) -> NoReturn:
        """End all workers; raise an error with their reports and tracebacks."""
        self._wait_for_exit(REACTION_TIME_S)  # one that has just reported may still be on its way out
        reports, tracebacks = [], []
        while not self._failures.empty():
            report, trace = self._failures.get()
            reports.append(report)
            tracebacks.append(trace)
        dead = [process for process in self._processes if process.exitcode not in (None, 0)]
        reports += [f"{process.name} {_describe_exit(process.exitcode)}." for process in dead]
        self._finish(force=True)
        lines = [
            *(reports or ["No cause was reported; see the messages above."]),
            "One or more background workers are no longer alive.",
            FAILURE_HINT,
        ]
        raise RuntimeError("\n".join(lines)) from (WorkerTracebackError("\n".join(tracebacks)) if tracebacks else None)


def choose_start_method() -> str:
    """Return the start method of workers: fork where that is safe, else spawn.

    Fork is fast and shares memory.
    """
    return "fork" if sys.platform.startswith("linux") else "spawn"


def _produce(channels: _Channels, loader: Iterator[dict], transform: Any, worker: int, entropy: int) -> None:
    """Draw batches in a worker until told to stop, or until the process that started it is gone."""
    try:
        log_plainly()
        prepare_worker()
        seed_generators([entropy, worker])
        if hasattr(loader, "set_thread_id"):
            loader.set_thread_id(worker)
        while not channels.abort.is_set():
            batch = next(loader)
            if transform is not None:
                batch = transform(**batch)
            _share_(batch)
            if not _put(channels, batch):
                return
    except KeyboardInterrupt:
        channels.abort.set()
    except Exception as error:  # noqa: BLE001  reported, whatever it is: here nobody else would see it
        _report_failure(channels, f"augmentation-{worker} failed", error)


def _report_failure(channels: _Channels, fault: str, error: Exception) -> None:
    """Report a fault with the current traceback; tell all processes to stop."""
    report = f"{fault}: {type(error).__name__}: {error}"[:MAX_REPORT_LENGTH].rstrip(": ")
    channels.failures.put((report, traceback.format_exc()[-MAX_REPORT_LENGTH:]))
    channels.abort.set()


def prepare_worker() -> None:
    """Set up an augmentation process: one thread, and reused memory.

    The workers together fill the processor already. Every sample needs the same few arrays of some MiB; glibc gives
    such memory back when it is freed, and getting it anew means to fault in and clear each of its pages.
    """
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_ARRAY)
            mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT_HEAP)


def _share_(batch: dict) -> None:
    """Move the tensors of a batch to shared memory.

    The queue would do it, but in a thread of its own, where a failure (no space left) would lose the batch unnoticed.
    """
    for value in batch.values():
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, torch.Tensor) and entry.device.type == "cpu":
                entry.share_memory_()


def _put(channels: _Channels, batch: dict) -> bool:
    """Hand a batch over as soon as there is room; return whether the worker should go on."""
    starter = multiprocessing.parent_process()
    while not channels.abort.is_set():
        if channels.pause.is_set():
            channels.abort.wait(REACTION_TIME_S)
            continue
        try:
            channels.batches.put(batch, timeout=REACTION_TIME_S)
            return True
        except queue.Full:
            if starter is not None and not starter.is_alive():
                os._exit(1)  # nobody reads the queue any more, so its own thread could never end
    return False


def _forward(channels: _Channels, ready: queue.Queue, gpu: int | None) -> None:
    """Carry batches from the process queue to the thread queue, pinned if there is a GPU, until told to stop."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    batch = None
    while not channels.abort.is_set():
        try:
            if batch is None:
                batch = channels.batches.get(timeout=REACTION_TIME_S)
                if gpu is not None:
                    batch = pin_memory_of_all_eligible_items_in_dict(batch)
            ready.put(batch, timeout=REACTION_TIME_S)
            batch = None
        except (queue.Empty, queue.Full):
            continue
        except Exception as error:  # noqa: BLE001  any: a batch is rebuilt here, and whoever waits for it would never know
            # A worker died while its batch was on the way, memory ran out, or a batch could not be pinned.
            _report_failure(channels, "a batch could not be received", error)


def _describe_exit(exit_code: int) -> str:
    meaning = SIGNALS.get(exit_code, "see the messages above")
    return f"ended with exit status {exit_code} ({meaning})"
