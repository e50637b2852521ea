"""Downloads of models over connections that break."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from nnunetv2.model_sharing import model_download
from nnunetv2.model_sharing.model_download import download_file

PIECE = 8192 * 16
"""What is received at a time; less is lost."""
BODY = np.random.default_rng(0).bytes(3_000_000)
OTHER = np.random.default_rng(1).bytes(2_500_000)


class Relay:
    """A server of one file whose connections break.

    Attributes:
        cuts: After how many bytes of a body to break each of the next connections.
        asked: The Range header of every request so far, or "".
    """

    def __init__(self) -> None:
        self.body, self.tag, self.knows_ranges, self.cuts = BODY, '"first"', True, []
        self.asked: list[str] = []
        self.carried = 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range", "")
        self.asked.append(wanted)
        start = int(re.fullmatch("bytes=([0-9]+)-", wanted)[1]) if wanted else 0
        is_rest = self.knows_ranges and wanted and handler.headers["If-Range"] == self.tag
        body = self.body[start:] if is_rest else self.body
        handler.send_response(206 if is_rest else 200)
        if is_rest:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        handler.send_header("ETag", self.tag)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        sent = body[: self.cuts.pop(0)] if self.cuts else body
        handler.wfile.write(sent)
        self.carried += len(sent)
        handler.close_connection = True


@pytest.fixture
def relay(monkeypatch) -> Iterator[Relay]:
    monkeypatch.setattr(model_download, "_PAUSE_S", 0.001)
    relay = Relay()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            relay.answer(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        relay.url = f"http://127.0.0.1:{server.server_port}/m.zip"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield relay
        server.shutdown()


def test_a_download_goes_on_where_it_broke(relay, tmp_path, caplog):
    relay.cuts = [8 * PIECE + 1, 4 * PIECE]
    with caplog.at_level(logging.WARNING):
        download_file(relay.url, str(tmp_path / "m.zip"), sha256=hashlib.sha256(BODY).hexdigest())
    assert (tmp_path / "m.zip").read_bytes() == BODY
    assert relay.asked == ["", f"bytes={8 * PIECE}-", f"bytes={12 * PIECE}-"]
    assert relay.carried == len(BODY) + 1
    assert f"the connection broke after {8 * PIECE} bytes; going on" in caplog.text


def test_another_file_under_the_same_address_is_fetched_from_its_beginning(relay, tmp_path):
    relay.cuts = [1_000_000]
    answer = relay.answer

    def change_after_the_first(handler):
        if relay.asked:
            relay.body, relay.tag = OTHER, '"second"'
        answer(handler)

    relay.answer = change_after_the_first
    download_file(relay.url, str(tmp_path / "m.zip"))
    assert (tmp_path / "m.zip").read_bytes() == OTHER


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "knows_ranges"), [('W/"weak"', True), ('"first"', False)])
def test_what_cannot_be_resumed_is_fetched_anew(relay, tmp_path, tag, knows_ranges):
    relay.tag, relay.knows_ranges, relay.cuts = tag, knows_ranges, [2_000_000, 1_000_000]
    download_file(relay.url, str(tmp_path / "m.zip"))
    assert (tmp_path / "m.zip").read_bytes() == BODY


@pytest.mark.slow
def test_a_download_that_does_not_get_on_is_given_up(relay, tmp_path):
    relay.cuts = [PIECE] + [0] * 100
    with pytest.raises(OSError, match=f"broke off after {PIECE} bytes, 8 times in a row"):
        download_file(relay.url, str(tmp_path / "m.zip"))
    assert len(relay.asked) == 8
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nobody_answers_is_not_tried_again(relay, tmp_path):
    relay.cuts = [0]
    with pytest.raises(OSError):  # noqa: PT011  as the platform puts it
        download_file(relay.url, str(tmp_path / "m.zip"))
    assert relay.asked == [""]


def test_a_rest_that_is_not_the_one_asked_for_is_not_taken(relay, tmp_path):
    relay.cuts = [1_000_000]
    answer = relay.answer

    def shift(handler):
        if len(relay.asked) == 1:
            del handler.headers["Range"]
            handler.headers["Range"] = "bytes=7-"
        answer(handler)

    relay.answer = shift
    download_file(relay.url, str(tmp_path / "m.zip"))
    assert (tmp_path / "m.zip").read_bytes() == BODY
