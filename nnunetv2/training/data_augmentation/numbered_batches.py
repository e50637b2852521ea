"""Draw each batch from random numbers of its own.

So batches repeat exactly, however many workers draw them.
"""

from __future__ import annotations

import contextlib
import queue
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


def seed_generators(entropy: int | Sequence[int]) -> None:
    """Seed the global generators of NumPy, torch and Python, each differently."""
    for_numpy, for_torch, for_python = np.random.SeedSequence(entropy).generate_state(3)
    np.random.seed(int(for_numpy))
    torch.manual_seed(int(for_torch))
    random.seed(int(for_python))


@contextlib.contextmanager
def random_numbers_from(entropy: Sequence[int]) -> Iterator[None]:
    """Seed the global generators for a while.

    Afterwards they go on as if nothing had been drawn from them.
    """
    states = np.random.get_state(), torch.get_rng_state(), random.getstate()
    seed_generators(entropy)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        torch.set_rng_state(states[1])
        random.setstate(states[2])


class NumberedBatches:
    """An iterator over the batches `first`, `first + step`, ... of a loader.

    Batch n is drawn with the generators seeded by `entropy` and n. It is the same wherever and whenever it is drawn, if
    the loader remembers nothing between batches.
    """

    def __init__(self, loader: Iterator[dict], entropy: Sequence[int], *, first: int = 0, step: int = 1):
        self.loader = loader
        self._entropy = tuple(entropy)
        self._next, self._step = first, step

    def __iter__(self) -> NumberedBatches:
        return self

    def __next__(self) -> dict:
        with random_numbers_from((*self._entropy, self._next)):
            batch = next(self.loader)
        self._next += self._step
        return batch

    def __getattr__(self, name: str) -> Any:
        """Look everything else up in the loader: users inspect `augmenter.generator`."""
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


class QueuesInTurn:
    """Several queues that are read like one, an item of each in turn."""

    def __init__(self, queues: Sequence[Any]):
        self.queues = list(queues)
        self._turn = 0

    def get(self, timeout: float) -> Any:
        """Return the next item of the queue whose turn it is.

        Raises:
            queue.Empty: It did not come in time. It will be this queue's turn again.
        """
        item = self.queues[self._turn].get(timeout=timeout)
        self._turn = (self._turn + 1) % len(self.queues)
        return item

    def get_nowait(self) -> Any:
        """Return an item of any queue; used to empty them."""
        for one in self.queues:
            with contextlib.suppress(queue.Empty):
                return one.get_nowait()
        raise queue.Empty

    def empty(self) -> bool:
        """Tell whether no queue has anything."""
        return all(one.empty() for one in self.queues)

    def close(self) -> None:
        """Close all queues."""
        for one in self.queues:
            one.close()

    def join_thread(self) -> None:
        """Wait for the threads of all queues."""
        for one in self.queues:
            one.join_thread()
