"""Wake requests that wait for a gathering when it changes, without asking over and over."""
from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

ANYTHING = "*"
"""Key of those who wait for any gathering to change."""


class Changes:
    """Wake the requests that wait for a gathering to change."""

    def __init__(self) -> None:
        self.stopping = False
        self.count = 0
        """Changes since the start. Read by the event loop only."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: weakref.WeakValueDictionary[str, asyncio.Event] = weakref.WeakValueDictionary()

    def bind(self) -> None:
        """Belong to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def expect(self, key: str) -> asyncio.Event:
        """Return the event of the next change. Ask for it before looking at the gathering, so that none is missed."""
        event = self._events.get(key)
        if event is None:
            event = self._events[key] = asyncio.Event()
        return event

    def notify(self, key: str) -> None:
        """Wake those who wait for a gathering; from any thread."""
        self._call(lambda: self._wake([key, ANYTHING]))

    def stop(self) -> None:
        """Wake everybody, for good: the coordinator is about to stop. From any thread."""
        self.stopping = True
        self._call(lambda: self._wake(list(self._events)))

    def _call(self, function: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def _wake(self, keys: list[str]) -> None:
        self.count += 1
        for key in keys:
            event = self._events.pop(key, None)
            if event is not None:
                event.set()
