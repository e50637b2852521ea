"""Decide who may rehearse the transfer of weights, and with how many bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nnunetv2.federated.coordinator.token_bucket import TokenBucket
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol import api

BYTES_AT_ONCE = 4 << 30
"""That one site may rehearse with when it has not for a while,"""
BYTES_PER_S = BYTES_AT_ONCE / 86_400
"""and in the long run."""
LEAST_COST = 1 << 20
"""Bytes that every rehearsal counts for, however small."""
MOST_SITES = 4
"""That rehearse at the same time: the line is there for rounds."""


class Rehearsals:
    """The rehearsals of one coordinator, and the bytes that each site has left. Thread-safe.

    Args:
        clock: Seconds, from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._budget = TokenBucket(per_s=BYTES_PER_S, at_once=BYTES_AT_ONCE)
        self._at_work: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def admitted(self, site: str, size: int) -> Iterator[None]:
        """Admit a rehearsal with so many bytes.

        Raises:
            RefusedError: It is too large, the site is at one already, too many are, or its budget is spent.
        """
        if not 0 < size <= api.LARGEST_REHEARSAL:
            raise RefusedError(f"a rehearsal has 1 to {api.LARGEST_REHEARSAL} bytes, not {size}", code="too_large")
        with self._lock:
            now = self._clock()
            wait_s = self._budget.wait_s(site, now)
            if wait_s:
                raise RefusedError(
                    f"{site} has rehearsed with enough bytes for now",
                    f"Try again in {max(1, round(wait_s / 60))} min.",
                    code="too_many_bytes",
                )
            if site in self._at_work or len(self._at_work) >= MOST_SITES:
                raise RefusedError("another rehearsal is going on", "Try again in a minute.", code="refused")
            self._budget.spend(site, now, max(size, LEAST_COST))
            self._at_work.add(site)
        try:
            yield
        finally:
            with self._lock:
                self._at_work.discard(site)
