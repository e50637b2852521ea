"""Download a zip file of models and install it."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nnunetv2.model_sharing.archive_check import ArchiveLimits
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.loopback import is_loopback
from nnunetv2.utilities.resumable_download import PartialDownload, announced_size, strong_tag

if TYPE_CHECKING:
    from requests import Response, Session

logger = logging.getLogger(__name__)

_TIMEOUT_S = 100
"""Seconds without a byte after which a connection has failed."""
_ATTEMPTS = 8
"""Connections in a row that bring nothing new before a download that has begun is given up."""
_PAUSE_S = 1.0
"""Pause after the first of them; it doubles with each."""


def download_and_install_from_url(url: str, sha256: str | None = None) -> None:
    """Download a zip file of models, install it below nnUNet_results, and remove it again.

    Args:
        url: With https.
        sha256: If given, the SHA-256 that the file must have, in hexadecimal digits.

    Raises:
        RuntimeError: nnUNet_results is not set.
        ValueError: The address is not safe, the file is too large, or not the expected one.
        OSError: The download failed.
    """
    target = Path(nnUNet_results)
    target.mkdir(parents=True, exist_ok=True)
    # beside the models, where there must be room for them anyway, and not in the home folder or /tmp
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target) as folder:
        file = download_file(url, str(Path(folder, "model.zip")), sha256=sha256)
        install_model_from_zip_file(file)


def download_file(
    url: str,
    local_filename: str,
    chunk_size: int = 8192 * 16,
    *,
    sha256: str | None = None,
    max_bytes: int | None = None,
) -> str:
    """Download a file, showing progress.

    It appears under its name once it is complete and correct.

    Args:
        local_filename: Where it is written; the folder must exist.
        chunk_size: Bytes per read.
        sha256: See `download_and_install_from_url`.
        max_bytes: Largest size. Default: that of an installed model, 64 GiB or nnUNet_max_model_gb.

    Returns:
        `local_filename`.

    Raises:
        ValueError: The address is not https (or this machine), the file is too large, or it has another checksum.
        OSError: The server answered with an error or not at all, or the connection broke again and again.
    """
    import requests

    _check_address(url)
    expected = None if sha256 is None else _normalize_digest(sha256)
    limit = ArchiveLimits.from_environment().total_bytes if max_bytes is None else max_bytes
    with requests.Session() as session, replacing(local_filename) as written:
        session.trust_env = urlsplit(url).scheme == "https"  # plain HTTP is this machine: no proxy in between
        digest = _persist(session, url, PartialDownload(written), chunk_size, limit)
        if expected is not None and digest != expected:
            raise ValueError(
                f"{url} is not the expected file: its SHA-256 is {digest}, expected {expected}. Nothing was installed"
            )
    return local_filename


def _persist(session: Session, url: str, download: PartialDownload, chunk_size: int, limit: int) -> str:
    """Receive a file and return its SHA-256; go on where a connection breaks, as long as others bring more of it."""
    import requests

    furthest, failures = 0, 0
    while True:
        try:
            return _receive(session, url, download, chunk_size, limit)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            failures = 1 if download.size > furthest else failures + 1
            furthest = max(furthest, download.size)
            if furthest == 0:
                raise  # most likely the address is wrong
            if failures >= _ATTEMPTS:
                raise OSError(
                    f"the download of {url} broke off after {furthest} bytes, {failures} times in a row "
                    f"({error}); try again"
                ) from error
            pause = _PAUSE_S * 2 ** (failures - 1)
            logger.warning("the connection broke after %d bytes; going on in %g s", download.size, pause)
            time.sleep(pause)


def _receive(session: Session, url: str, download: PartialDownload, chunk_size: int, limit: int) -> str:
    """Ask once for a file, or for the rest of it, and return its SHA-256."""
    from tqdm import tqdm

    too_large = ValueError(
        f"{url} is larger than the limit of {limit / 2**30:.1f} GiB; set nnUNet_max_model_gb if you trust it"
    )
    with _answer(session, url, download) as response:
        size = announced_size(response)
        if size is not None and size > limit:
            raise too_large
        begin = download.size if response.status_code == 206 else 0
        with tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc="download") as bar:

            def watch(received: int) -> None:
                if received > limit:
                    raise too_large
                bar.update(received - bar.n)

            return download.receive(response, tag=strong_tag(response), piece_bytes=chunk_size, watch=watch)


@contextmanager
def _answer(session: Session, url: str, download: PartialDownload) -> Iterator[Response]:
    """Send a request and yield the answer, if it is a good one that comes from where it may."""
    import requests

    with session.get(url, stream=True, timeout=_TIMEOUT_S, headers=download.headers()) as response:
        for step in (*response.history, response):  # no redirection may leave https either
            _check_address(step.url)
        if response.status_code == 416:  # it is shorter than the part that was received: another file
            download.forget()
            raise requests.ConnectionError(f"{url} is another file now than before")
        response.raise_for_status()
        yield response


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
        raise ValueError(
            f"{url} is not downloaded: models come over https only, since anybody on the way could "
            "exchange them. Download it by other means, compare its checksum and install it with "
            "nnUNetv2_install_pretrained_model_from_zip"
        )


def _normalize_digest(text: str) -> str:
    digest = text.strip().lower().removeprefix("sha256:")
    if len(digest) != 64 or any(letter not in "0123456789abcdef" for letter in digest):
        raise ValueError(f"{text!r} is no SHA-256: expected 64 hexadecimal digits, as sha256sum prints them")
    return digest
