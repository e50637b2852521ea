"""Wake the requests that wait for an exchange when it changes, instead of polling."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PROGRESS_PER_S = 50.0
"""Requests that news which nobody has to act on wakes per second, at most: a twentieth of a core."""
ANYTHING = "*"
"""Key of those who wait for any change."""
NEWS = ""
"""Key of news for people that belong to no exchange."""


class Notifier:
    """Wake the requests that wait for an exchange to change.

    Those who wait do so on one event loop, which `bind` names; whoever notifies may be on any thread. Without a loop
    nobody waits, and nothing happens.

    Args:
        hears_progress: Whether progress is notified, too. At a gateway it is not: requests that have waited in vain
            look again.
    """

    def __init__(self, *, hears_progress: bool = True) -> None:
        self.hears_progress = hears_progress
        self.stopping = False
        self.count = 0
        """Changes since the start. Read by the event loop only."""
        self._waiting: Counter[str] = Counter()
        self._in_progress: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: weakref.WeakValueDictionary[str, asyncio.Event] = weakref.WeakValueDictionary()
        self._subscribers: list[Callable[[str], None]] = []

    # -------------------------------------------------------------------------------------------------- who waits
    def subscribe(self, subscriber: Callable[[str], None]) -> None:
        """Call a function with the key of every change but mere progress.

        It is called on the thread that notifies.
        """
        self._subscribers.append(subscriber)

    def bind(self) -> None:
        """Belong to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def expect(self, key: str) -> asyncio.Event:
        """Return the event of the next change; ask before looking, to miss none."""
        event = self._events.get(key)
        if event is None:
            event = self._events[key] = asyncio.Event()
        return event

    @contextmanager
    def waiting(self, key: str) -> Iterator[asyncio.Event]:
        """Yield the event of `expect`, and count who waits as long as the block lasts."""
        self._waiting[key] += 1
        try:
            yield self.expect(key)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    # ---------------------------------------------------------------------------------------------- who notifies
    def notify(self, key: str) -> None:
        """Wake those who wait for an exchange."""
        for subscriber in self._subscribers:
            subscriber(key)
        self._call(lambda: self._wake([key, ANYTHING]))

    def notify_progress(self, key: str) -> None:
        """Wake those who wait for an exchange soon.

        The more of them there are, the later.

        A round of n sites has n contributions; to wake all n sites at each would be n * n answers.
        """
        self._call(lambda: self._wake_later(key, asyncio.get_running_loop()))

    def stop(self) -> None:
        """Wake everybody, for good: the coordinator is about to stop."""
        self.stopping = True
        self._call(lambda: self._wake(list(self._events)))

    # ---------------------------------------------------------------------------------------------- on the loop
    def _call(self, function: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def _wake_later(self, key: str, loop: asyncio.AbstractEventLoop) -> None:
        self._wake([ANYTHING])
        if key not in self._in_progress:
            self._in_progress.add(key)
            loop.call_later(self._waiting[key] / PROGRESS_PER_S, self._wake, [key])

    def _wake(self, keys: list[str]) -> None:
        self.count += 1
        for key in keys:
            self._in_progress.discard(key)
            event = self._events.pop(key, None)
            if event is not None:
                event.set()
