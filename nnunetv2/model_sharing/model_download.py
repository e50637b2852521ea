"""Download a zip file of models and install it."""
from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nnunetv2.model_sharing.archive_check import ArchiveLimits
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.atomic_write import replacing

if TYPE_CHECKING:
    from requests import Response

_TIMEOUT_S = 100
"""Seconds without a byte after which a download has failed."""
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


def download_and_install_from_url(url: str, sha256: str | None = None) -> None:
    """Download a zip file of models, install it below nnUNet_results, and remove it again.

    Args:
        url: With https.
        sha256: If given, what the file's SHA-256 must be, in hexadecimal digits.

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


def download_file(url: str, local_filename: str, chunk_size: int = 8192 * 16, *, sha256: str | None = None,
                  max_bytes: int | None = None) -> str:
    """Download a file, showing progress; it appears under its name once it is complete and correct.

    Args:
        local_filename: Where it is written; the folder must exist.
        chunk_size: Bytes per read.
        sha256: See `download_and_install_from_url`.
        max_bytes: Largest size. Default: that of an installed model, 64 GiB or nnUNet_max_model_gb.

    Returns:
        `local_filename`.

    Raises:
        ValueError: The address is not https (or this machine), the file is too large, or it has another checksum.
        OSError: The server answered with an error, or the connection broke.
    """
    import requests

    _check_address(url)
    expected = None if sha256 is None else _normalize_digest(sha256)
    limit = ArchiveLimits.from_environment().total_bytes if max_bytes is None else max_bytes
    with requests.Session() as session, session.get(url, stream=True, timeout=_TIMEOUT_S) as response:
        for step in (*response.history, response):  # no redirection may leave https either
            _check_address(step.url)
        response.raise_for_status()
        with replacing(local_filename) as written:
            digest = _save(response, written, chunk_size, limit)
            if expected is not None and digest != expected:
                raise ValueError(f"{url} is not the expected file: its SHA-256 is {digest}, expected {expected}. "
                                 "Nothing was installed")
    return local_filename


def _save(response: Response, path: Path, chunk_size: int, limit: int) -> str:
    """Write the body of a response and return its SHA-256."""
    from tqdm import tqdm

    size = _announced_size(response)
    too_large = ValueError(f"{response.url} is larger than the limit of {limit / 2**30:.1f} GiB; set "
                           "nnUNet_max_model_gb if you trust it")
    if size is not None and size > limit:
        raise too_large
    digest, received = hashlib.sha256(), 0
    with path.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, desc="download") as bar:
        for chunk in response.iter_content(chunk_size=chunk_size):
            received += len(chunk)
            if received > limit:
                raise too_large
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
    if size is not None and received != size:
        raise OSError(f"the download of {response.url} broke off after {received} of {size} bytes; try again")
    return digest.hexdigest()


def _announced_size(response: Response) -> int | None:
    """Return the size in bytes if the server tells it. With a content encoding it would be that of encoded bytes."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() and "Content-Encoding" not in response.headers else None


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    is_local = parts.hostname in _LOCAL_HOSTS
    if parts.scheme != "https" and not (parts.scheme == "http" and is_local):
        raise ValueError(f"{url} is not downloaded: models come over https only, since anybody on the way could "
                         "exchange them. Download it by other means, compare its checksum and install it with "
                         "nnUNetv2_install_pretrained_model_from_zip")


def _normalize_digest(text: str) -> str:
    digest = text.strip().lower().removeprefix("sha256:")
    if len(digest) != 64 or any(letter not in "0123456789abcdef" for letter in digest):
        raise ValueError(f"{text!r} is no SHA-256: expected 64 hexadecimal digits, as sha256sum prints them")
    return digest
