"""Write files so that readers see the old content or the whole new one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".partial-"
A_DAY_S = 86400
"""Age of leftovers of long tasks, such as unpacking a model over a slow network."""
_NIFTI_ENDINGS = (".nii.gz", ".nii")
_DISK_TROUBLE = {getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT", "EIO", "EROFS") if hasattr(errno, name)}


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let errors of a broken or full disk name the file.

    The system does not.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_TROUBLE and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to.

    It takes the place of `path` once the block has succeeded.

    The yielded file has the name of `path`, in a fresh folder beside it, because image libraries choose the format by
    the ending. Further files that the block writes into that folder (raw data next to a header) go along, first. If the
    block raises, its files are removed and `path` stays as it was. A symbolic link keeps pointing where it did, and
    its target is replaced. A NIfTI file with a dot inside its name is yielded under a plainer one.

    Raises:
        FileNotFoundError: The folder of `path` does not exist, or the block wrote no file.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {target.parent} does not exist")
    scratch = make_scratch(target.parent)
    try:
        stem, scratch_stem, ending = _split_name(target.name)
        written = scratch / f"{scratch_stem}{ending}"
        with naming(path):
            yield written
            if not written.is_file():
                raise FileNotFoundError(f"nothing was written for {path}")
            companions = [file for file in scratch.iterdir() if file != written]
            for file in (*companions, written):
                flush_to_disk(file)
                name = stem + file.name.removeprefix(scratch_stem) if file.name.startswith(scratch_stem) else file.name
                file.replace(target.parent / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def copy_atomically(source: str | os.PathLike[str], path: str | os.PathLike[str], *, keep_time: bool = False) -> None:
    """Copy the content of a file.

    The copy has the permissions of any new file: raw data are often read-only, and a copy must be replaceable.

    Args:
        keep_time: Give the copy the time of modification of its original.
    """
    with replacing(path) as written:
        shutil.copyfile(source, written)
        if keep_time:
            about = Path(source).stat()
            os.utime(written, ns=(about.st_atime_ns, about.st_mtime_ns))


def make_scratch(folder: str | os.PathLike[str]) -> Path:
    """Create a folder for files that are being written.

    `remove_leftovers` finds it if this process is killed.
    """
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))


def remove_leftovers(folder: str | os.PathLike[str], older_than_s: float = 3600) -> None:
    """Remove scratch folders that killed processes have left.

    Those in which something changed less than `older_than_s` seconds ago stay, for another process may be writing into
    them. A caller that holds a lock, and so knows that there is none, may give 0.
    """
    for scratch in Path(folder).glob(f"{_PREFIX}*"):
        try:
            changed = max(path.lstat().st_mtime for path in (scratch, *scratch.rglob("*")))
        except OSError:  # it has just been finished
            continue
        if older_than_s == 0 or time.time() - changed > older_than_s:
            shutil.rmtree(scratch, ignore_errors=True)


def save_json_atomically(obj: object, path: str | os.PathLike[str], *, sort_keys: bool = True) -> None:
    """Write `obj` as JSON with an indent of 4.

    This is the layout of all JSON files of nnU-Net.
    """
    text = json.dumps(obj, indent=4, sort_keys=sort_keys)
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")


def _split_name(name: str) -> tuple[str, str, str]:
    """Return the stem of a file name, the one to write under instead, and the ending.

    ITK writes x.nii.gz when it is told x.nii.nii.gz, and pairs of files for x.img.nii.gz.
    """
    ending = next((ending for ending in _NIFTI_ENDINGS if name.lower().endswith(ending)), "")
    stem, ending = name[: len(name) - len(ending)], name[len(name) - len(ending) :]
    return stem, "image" if ending and "." in stem else stem, ending


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable.

    Without this a power failure after a rename can leave a complete name with empty content.
    """
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return  # Windows keeps folders durable on its own, and does not open them
    # Windows flushes no file that is open for reading only; elsewhere the file may be one that nobody may write to.
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
