"""Stand between sites and a coordinator, and do what networks and proxies do on a bad day."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Coroutine
from typing import Literal

Trouble = Literal["drop", "freeze", "truncate", "duplicate", "garble"]
TROUBLES: tuple[Trouble, ...] = ("drop", "freeze", "truncate", "duplicate", "garble")
REMEMBERED = 32 << 20
"""Bytes of a connection that can be sent a second time."""


class BadNetwork:
    """A relay on a port of its own, in a thread of its own; good as long as nobody asks for trouble.

    drop       every connection breaks, new ones break at once
    freeze     nothing comes through; then everything does
    truncate   connections break after a random number of bytes, in either direction
    duplicate  all that a site has sent on a connection arrives a second time, on another one
    garble     a piece of what comes through comes through twice, inside of large bodies
    """

    def __init__(self, port: int, *, seed: int = 0) -> None:
        self.port = 0
        self.hits: Counter[str] = Counter()
        self._upstream_port = port
        self._rng = random.Random(seed)
        self._trouble: Trouble | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]

    def set_trouble(self, trouble: Trouble | None) -> None:
        """Be bad in one way from now on, or good."""

        async def change() -> None:
            self._trouble = trouble
            if trouble == "drop":
                self._break_all()

        self._call(change())

    def close(self) -> None:
        """Break everything and end."""

        async def end() -> None:
            self._server.close()
            self._break_all()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, coroutine: Coroutine) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def _break_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    # ------------------------------------------------------------------------------------------- in the relay's thread
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        self._writers.add(writer)
        try:
            if self._trouble == "drop":
                self.hits["drop"] += 1
                writer.transport.abort()
                return
            try:
                there, back = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            except OSError:
                writer.transport.abort()
                return
            self._writers.add(back)
            sent = bytearray()
            both = [
                asyncio.ensure_future(self._pump(reader, back, sent)),
                asyncio.ensure_future(self._pump(there, writer, None)),
            ]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            back.transport.abort()
            writer.transport.abort()
            self._writers.discard(back)
            if self._trouble == "duplicate" and sent:
                await self._send_again(bytes(sent))
        finally:
            self._writers.discard(writer)
            self._tasks.discard(asyncio.current_task())

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytearray | None) -> None:
        """Carry bytes in one direction until the connection ends or is broken."""
        left: int | None = None
        while piece := await reader.read(1 << 16):
            while self._trouble == "freeze":
                self.hits["freeze"] += 1
                await asyncio.sleep(0.05)
            if self._trouble == "drop":
                return
            if self._trouble == "truncate":
                left = self._rng.choice((0, 200, 1 << 16, 1 << 19)) if left is None else left
                if len(piece) > left:
                    self.hits["truncate"] += 1
                    writer.write(piece[:left])
                    await writer.drain()
                    return
                left -= len(piece)
            if self._trouble == "garble" and len(piece) == 1 << 16 and self._rng.random() < 0.1:
                self.hits["garble"] += 1
                piece = piece[: 1 << 15] + piece[: 1 << 15]
            if self._trouble == "duplicate" and sent is not None and self._rng.random() < 0.2:
                return  # break it, so that what was sent is sent again
            if sent is not None and len(sent) < REMEMBERED:
                sent += piece
            writer.write(piece)
            await writer.drain()

    async def _send_again(self, sent: bytes) -> None:
        """Deliver everything that came on a connection a second time, as proxies do that try again by themselves."""
        self.hits["duplicate"] += 1
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            self._writers.add(writer)
            writer.write(sent)
            await asyncio.wait_for(writer.drain(), 5)
            while await asyncio.wait_for(reader.read(1 << 16), 0.5):
                pass
        except (OSError, asyncio.TimeoutError):
            pass
        finally:
            if "writer" in locals():
                self._writers.discard(writer)
                writer.transport.abort()
