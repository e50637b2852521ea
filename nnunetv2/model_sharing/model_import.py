"""Install models from a zip file below nnUNet_results."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nnunetv2.model_sharing.archive_check import ArchiveLimits, UnsafeArchiveError, check_archive
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.atomic_write import A_DAY_S, make_scratch, remove_leftovers

_CHUNK = 2**20


def install_model_from_zip_file(zip_file: str, *, dataset_name: str | None = None) -> None:
    """Unpack a zip file that `export_pretrained_model` wrote; files that exist already are replaced.

    Everything is checked, then unpacked beside its place, and then renamed: if anything is wrong with the file, no
    model changes. Nothing in it is executed; checkpoints and pickles are read with care whenever they are used. The
    leftovers of a killed installation are removed by one a day later.

    Args:
        dataset_name: Folder in nnUNet_results that takes the place of the one that the file names.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeArchiveError: It names places outside of nnUNet_results, holds links or files that no model has, or is too
            large. nnUNet_max_model_gb (default 64) is the largest unpacked size.
        RuntimeError: nnUNet_results is not set.
        ValueError: The file is no zip file, or damaged.
    """
    target = Path(nnUNet_results)
    if not Path(zip_file).is_file():
        raise FileNotFoundError(f"there is no file {zip_file}")
    target.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(zip_file) as archive:
            files = check_archive(archive, target, ArchiveLimits.from_environment())
            _install(archive, files, target, dataset_name)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{zip_file} is no zip file, or it is damaged: {error}") from error


def _install(
    archive: zipfile.ZipFile, files: Sequence[zipfile.ZipInfo], target: Path, dataset_name: str | None
) -> None:
    remove_leftovers(target, older_than_s=A_DAY_S)
    needed, free = sum(member.file_size for member in files), shutil.disk_usage(target).free
    if needed > free:
        raise OSError(f"{archive.filename} needs {needed / 2**30:.1f} GiB in {target}, {free / 2**30:.1f} are free")
    scratch = make_scratch(target)
    try:
        for member in files:
            _unpack(archive, member, scratch / member.filename)
        for member in files:
            first, *rest = PurePosixPath(member.filename).parts
            place = target.joinpath(dataset_name or first, *rest) if rest else target / first
            _replace(scratch / member.filename, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write a member, and at most as many bytes as the archive's directory claims."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(member) as source, path.open("xb") as file:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > member.file_size:
                raise UnsafeArchiveError(f"{archive.filename}: {member.filename!r} is larger than it says")
            file.write(chunk)
    if written != member.file_size:
        raise ValueError(f"{archive.filename}: {member.filename!r} is truncated")


def _replace(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UnsafeArchiveError(f"{path} is a folder, but the archive has a file of this name")
    source.replace(path)
