"""Check paths, sizes and kinds of a model archive's files before extraction.

A zip file from elsewhere may name places outside of the target folder, hold links that lead there, or unpack to a
thousand times its size. Such a file is refused as a whole; no part of a manipulated model is worth keeping.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nnunetv2.utilities.plain_text import printable
from nnunetv2.utilities.size_limits import DEFAULT_BYTES, GIB, largest_model_bytes


class UnsafeArchiveError(RuntimeError):
    """A zip file holds something foreign to a model.

    The message names it.
    """


@dataclass(frozen=True)
class ArchiveLimits:
    """Largest size of an archive."""

    total_bytes: int = DEFAULT_BYTES
    """All files together, unpacked."""
    members: int = 100_000
    ratio: int = 200
    """Unpacked size of a file over its packed size, above which a file of more than `ratio_applies_from` is refused.
    JSON shrinks to a tenth, weights hardly at all; a bomb to a thousandth."""
    ratio_applies_from: int = 16 * 2**20

    def __post_init__(self) -> None:
        if min(self.total_bytes, self.members, self.ratio) < 1:
            raise ValueError(f"limits must be at least 1: {self}")

    @classmethod
    def from_environment(cls) -> ArchiveLimits:
        """Read the total from nnUNet_max_model_gb, if it is set."""
        return cls(total_bytes=largest_model_bytes())


# Endings of a model's files; no member may be an executable, a script or a Python module.
_EXPECTED_ENDINGS = re.compile(
    r"\.(json|pth|png|pdf|pkl|txt|csv|md|npz|npy|gz|nii|nrrd|mha|gipl|tif|tiff|bmp|jpg|jpeg|html|svg|yaml|yml|log)$",
    re.IGNORECASE,
)
_WITHOUT_ENDING = {"license", "licence", "readme", "notice", "citation"}
_RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)(\.|$)")


def check_archive(archive: zipfile.ZipFile, target: Path | None, limits: ArchiveLimits) -> list[zipfile.ZipInfo]:
    """Return the files of an archive, all of which may be written below `target`.

    Args:
        target: Folder of models, in which links may lie; None where nothing is to be written yet.

    Raises:
        UnsafeArchiveError: The archive does not look like a model export; the message gives the reason.
    """
    members = archive.infolist()
    if len(members) > limits.members:
        raise UnsafeArchiveError(f"{archive.filename} has {len(members)} members, more than {limits.members}")
    files = [member for member in members if not member.is_dir()]
    for member in members:
        _check_place(archive, member, target)
    seen: set[str] = set()
    for member in files:
        _check_file(archive, member, limits)
        name = member.filename.casefold()
        if name in seen:
            raise UnsafeArchiveError(f"{archive.filename} holds {member.filename!r} twice")
        seen.add(name)
    total = sum(member.file_size for member in files)
    if total > limits.total_bytes:
        raise UnsafeArchiveError(
            f"{archive.filename} unpacks to {total / GIB:.1f} GiB, more than the limit of "
            f"{limits.total_bytes / GIB:.1f} GiB; set nnUNet_max_model_gb if you trust it"
        )
    return files


def _check_place(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path | None) -> None:
    name = member.filename
    parts = PurePosixPath(name).parts

    def refuse(reason: str) -> UnsafeArchiveError:
        return UnsafeArchiveError(
            f"{archive.filename} is refused: its member {name!r} {reason}. It may be an attack; nothing was installed"
        )

    if not parts or name.startswith("/") or re.match(r"^[A-Za-z]:", name) or "\\" in name or "\0" in name:
        raise refuse("has no relative path")
    if ".." in parts:
        raise refuse("leads out of the folder of models")
    if printable(name) != name:
        raise refuse("has characters in its name that cannot be seen")
    if any(_RESERVED.match(part) or part.endswith((" ", ".")) or ":" in part for part in parts):
        raise refuse("has a name that not all systems can write")
    if not parts[0].startswith("Dataset"):
        raise refuse("does not belong to a dataset (DatasetXXX_NAME/...)")
    mode = member.external_attr >> 16
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise refuse("is a link or a special file")
    # A link that lies in the folder of models already must not lead the files elsewhere either.
    if target is None:
        return
    place = target
    for part in parts:
        place = place / part
        if place.is_symlink() and not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(target)):
            raise refuse(f"would be written through the link {place}")


def _check_file(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limits: ArchiveLimits) -> None:
    name = PurePosixPath(member.filename).name
    if member.flag_bits & 1:
        raise UnsafeArchiveError(f"{archive.filename}: {member.filename!r} is encrypted")
    if not _EXPECTED_ENDINGS.search(name) and name.lower() not in _WITHOUT_ENDING:
        raise UnsafeArchiveError(
            f"{archive.filename} is refused: {member.filename!r} is no kind of file that models "
            "consist of (weights, JSON, pictures, label maps). Nothing was installed"
        )
    if member.file_size > limits.ratio_applies_from and member.file_size > limits.ratio * max(1, member.compress_size):
        raise UnsafeArchiveError(
            f"{archive.filename} is refused: {member.filename!r} unpacks from "
            f"{member.compress_size} to {member.file_size} bytes, which weights or JSON never do. "
            "Nothing was installed"
        )
