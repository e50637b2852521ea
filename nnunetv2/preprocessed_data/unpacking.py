"""Unpack compressed NumPy archives of cases to plain arrays that can be memory-mapped."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.atomic_write import replacing

logger = logging.getLogger(__name__)

_ATTEMPTS = 3


def unpack_dataset(
    folder: str,
    unpack_segmentation: bool = True,
    overwrite_existing: bool = False,
    num_processes: int = default_num_processes,
    verify: bool = False,
) -> None:
    """Unpack each `case.npz` of a folder to `case.npy` and `case_seg.npy`.

    Runs in threads: decompression releases Python's lock, and threads start at once. Each array appears under its name
    only when it is complete.

    Args:
        overwrite_existing: Also unpack arrays that were unpacked before.
        num_processes: Number of threads.
        verify: Open each result, old ones too; damaged ones are written again, up to twice.

    Raises:
        RuntimeError: An array cannot be read even then.
    """
    archives = sorted(path for path in Path(folder).glob("*.npz") if path.is_file() and not path.name.startswith("."))
    unpack = partial(
        _convert_to_npy,
        unpack_segmentation=unpack_segmentation,
        overwrite_existing=overwrite_existing,
        verify_npy=verify,
    )
    with ThreadPoolExecutor(max(1, num_processes)) as threads:
        for _ in threads.map(unpack, archives):
            pass


def _convert_to_npy(
    npz_file: str | Path, unpack_segmentation: bool = True, overwrite_existing: bool = False, verify_npy: bool = False
) -> None:
    """Unpack one archive."""
    archive = Path(npz_file)
    targets = {"data": archive.with_name(f"{archive.stem}.npy")}
    if unpack_segmentation:
        targets["seg"] = archive.with_name(f"{archive.stem}_seg.npy")
    for key, target in targets.items():
        if overwrite_existing or not target.is_file():
            _write_array(archive, key, target)
        if verify_npy:
            _verify_or_rewrite(archive, key, target)


def _write_array(archive: Path, key: str, target: Path) -> None:
    with np.load(archive) as arrays, replacing(target) as written:
        np.save(written, arrays[key])


def _verify_or_rewrite(archive: Path, key: str, target: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            np.load(target, mmap_mode="r")
            return
        except (ValueError, OSError, EOFError) as error:
            if attempt == _ATTEMPTS - 1:
                raise RuntimeError(
                    f"cannot read {target} although it was unpacked {attempt} times from {archive}; "
                    "is the disk full or failing?"
                ) from error
            logger.warning("%s is damaged (%s), unpacking it again", target, error)
            _write_array(archive, key, target)
