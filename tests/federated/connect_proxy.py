"""An outbound HTTP proxy as hospitals have one: it connects its clients (CONNECT), and sees nothing of what they say.

Run as a program, it writes one line per connection to a file: the address that the client asked for.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

PIECE_BYTES = 1 << 16


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what arrives until one side has ended."""
    try:
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass  # one side has gone; the other is told by the end of the connection


async def serve_client(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, places: dict[str, str], log: Path
) -> None:
    """Serve one client: connect it to where it wants to go, or to the place that stands for that."""
    try:
        request = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0].decode("ascii").split()
        with log.open("a", encoding="ascii") as file:
            file.write(" ".join(request[:2]) + "\n")
        if request[0] != "CONNECT":
            writer.write(b"HTTP/1.1 405 Method Not Allowed\r\nConnection: close\r\n\r\n")
            return
        host, _, port = places.get(request[1], request[1]).rpartition(":")
        try:
            far_reader, far_writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 10)
        except (OSError, asyncio.TimeoutError):
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        finally:
            far_writer.close()
    except (OSError, asyncio.IncompleteReadError):
        pass  # a client that has gone
    finally:
        writer.close()


async def main() -> None:
    """Serve until this process is told to end; say on standard output which port it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True, help="file of the addresses that were asked for")
    parser.add_argument(
        "--place",
        nargs=2,
        action="append",
        default=[],
        metavar=("ASKED", "MEANT"),
        help="a name with a port that only this proxy knows, and the address with a port behind it",
    )
    arguments = parser.parse_args()
    places = dict(arguments.place)
    server = await asyncio.start_server(
        lambda reader, writer: serve_client(reader, writer, places, arguments.log), arguments.host, arguments.port
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
