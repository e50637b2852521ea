"""Take file names apart.

An ending such as `.nii.gz` is two suffixes, so pathlib's own notion of one does not fit.
"""

from __future__ import annotations

import os


def strip_ending(name: str, ending: str) -> str:
    """Return `name` without `ending`: strip_ending("liver_1.nii.gz", ".nii.gz") is "liver_1".

    Raises:
        ValueError: The name does not end so.
    """
    if not ending or not name.endswith(ending):
        raise ValueError(f"file name {name!r} does not end in {ending!r}")
    return name[: -len(ending)]


def split_channel(name: str, ending: str) -> tuple[str, int] | None:
    """Split an image file name into case and channel: "liver_1_0002.nii.gz" gives ("liver_1", 2).

    Returns:
        None if the name does not end in an underscore, four digits and the ending.
    """
    stem = name[: -len(ending)] if ending and name.endswith(ending) else ""
    # Not a regular expression: this runs once per file of a dataset, of which there may be tens of thousands.
    case, underscore, channel = stem[:-5], stem[-5:-4], stem[-4:]
    is_image = case and underscore == "_" and channel.isascii() and channel.isdecimal()
    return (case, int(channel)) if is_image else None


def list_names(folder: str | os.PathLike[str], ending: str) -> list[str]:
    """Return the sorted names of a folder's files with an ending.

    Links to files that are not there are included.

    Their readers report them; left out, their cases would be missed by nobody.
    """
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.endswith(ending) and (entry.is_file() or _is_broken_link(entry))
        )


def _is_broken_link(entry: os.DirEntry) -> bool:
    """Tell whether a link leads nowhere. Hidden ones are locks of editors."""
    return entry.is_symlink() and not entry.is_dir() and not entry.name.startswith(".")
