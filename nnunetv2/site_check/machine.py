"""Check the variables, folders and disks that a training needs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.site_check.findings import Finding

LEAST_FREE = 1 << 30
"""Bytes that are to stay free wherever something is written."""
_TRIAL = 1 << 16  # bytes
_WRITTEN = (nnUNet_preprocessed, nnUNet_results)
_finding = partial(Finding, area="machine")


def check_folders() -> Iterator[Finding]:
    """Check the three variables, and access to the folders that they name."""
    for variable in (nnUNet_raw, *_WRITTEN):
        name = variable.env_var_name
        try:
            folder = Path(variable.require())
        except RuntimeError as error:
            sentence, _, meaning = str(error).partition(". ")
            remedy = f"export {name}=FOLDER, in ~/.bashrc too. {meaning.partition(' documentation')[0]}"
            yield _finding(name="variable_missing", state="problem", sentence=f"{sentence}.", remedy=remedy)
            continue
        if not folder.is_dir():
            yield _finding(
                name="folder_missing",
                state="problem",
                sentence=f"{name} names {folder}, which is no folder.",
                remedy=f"Create it (mkdir -p {folder}), mount its disk, or correct the variable.",
            )
        elif variable is not nnUNet_raw and (reason := _why_read_only(folder)) is not None:
            yield _finding(
                name="folder_read_only",
                state="problem",
                sentence=f"{name}={folder} cannot be written to ({reason}).",
                remedy="Give yourself the right to write there, or let the variable name another folder.",
            )
        else:
            yield _finding(name="folder", state="ok", sentence=f"{name}={folder}")


def check_disk(needed: Mapping[str, int]) -> Iterator[Finding]:
    """Check that there is room for the files still to be written.

    Args:
        needed: Environment variable -> bytes; "tmp" stands for the folder of temporary files.
    """
    folders = {variable.env_var_name: variable.get() for variable in _WRITTEN} | {"tmp": tempfile.gettempdir()}
    of_disk: dict[int, list[str]] = {}
    for name, folder in folders.items():
        if folder is not None and Path(folder).is_dir():
            of_disk.setdefault(Path(folder).stat().st_dev, []).append(name)
    for names in of_disk.values():
        free = shutil.disk_usage(str(folders[names[0]])).free
        wanted = sum(needed.get(name, 0) for name in names)
        where = f"{' and '.join(names)} ({folders[names[0]]})"
        sentence = f"{where}: {_gigabytes(free)} free, about {_gigabytes(wanted)} needed."
        if free < max(wanted, LEAST_FREE):
            remedy = "Free some space, or let the variable name a folder on a larger disk (TMPDIR for temporary files)."
            yield _finding(name="disk_full", state="problem", sentence=sentence, remedy=remedy)
        else:
            yield _finding(name="disk", state="ok", sentence=sentence)


def _why_read_only(folder: Path) -> str | None:
    """Try it, because permissions do not tell about read-only disks and network drives."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIAL))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
