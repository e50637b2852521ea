"""Limit how much each of many may spend, at once and in the long run."""

from __future__ import annotations

import threading
from collections.abc import Hashable

MAX_REMEMBERED = 10_000
"""Members and addresses whose requests are counted at a time; the rest have been quiet for longest."""


class TokenBucket:
    """Token buckets, one per key: capacity `at_once`, refilled at `per_s`.

    Thread-safe. `now` is of a clock that nobody sets: `time.monotonic`.
    """

    def __init__(self, *, per_s: float, at_once: float) -> None:
        self.per_s = per_s
        self.at_once = at_once
        self._spent: dict[Hashable, tuple[float, float]] = {}
        self._lock = threading.RLock()

    def wait_s(self, who: Hashable, now: float) -> float:
        """Return how long somebody has to wait before spending more; 0 for not at all."""
        with self._lock:
            return max(0.0, self._left_to_pay(who, now) + 1 - self.at_once) / self.per_s

    def spend(self, who: Hashable, now: float, cost: float = 1.0) -> None:
        """Count a cost as spent by somebody."""
        with self._lock:
            spent = self._left_to_pay(who, now) + cost
            self._spent.pop(who, None)  # the order of the dictionary is that of the last spending
            self._spent[who] = (spent, now)
            while len(self._spent) > MAX_REMEMBERED:
                del self._spent[next(iter(self._spent))]

    def take(self, who: Hashable, now: float) -> float:
        """Spend one, or return how long somebody has to wait before that."""
        with self._lock:  # however many ask at the same time
            wait_s = self.wait_s(who, now)
            if not wait_s:
                self.spend(who, now)
            return wait_s

    def _left_to_pay(self, who: Hashable, now: float) -> float:
        spent, since = self._spent.get(who, (0.0, now))
        return max(0.0, spent - (now - since) * self.per_s)
