"""Name the files of a dataset's fingerprint.

A dataset has its own, and in a federation the pooled one beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.utilities.json_files import read_json

FINGERPRINT_FILE = "dataset_fingerprint.json"
LOCAL_FINGERPRINT = "dataset_fingerprint_local.json"
"""This site's own fingerprint, in folders where FINGERPRINT_FILE is the pooled one."""
LISTS = ("spacings", "shapes_after_crop")
"""Fields of a fingerprint with one entry per case,"""
GEOMETRY_STATISTICS = "geometry_statistics"
"""and the field in their place where a federation pools order statistics only; see `case_geometry`."""


def count_cases(fingerprint: Mapping[str, Any]) -> int:
    """Return how many cases a fingerprint describes."""
    if GEOMETRY_STATISTICS in fingerprint:
        return int(fingerprint[GEOMETRY_STATISTICS]["num_cases"])
    return len(fingerprint[LISTS[0]])


def has_pooled_fingerprint(preprocessed_folder: Path) -> bool:
    """Tell whether FINGERPRINT_FILE is the pooled one."""
    return (preprocessed_folder / LOCAL_FINGERPRINT).is_file()


def pooled_fingerprint(preprocessed_folder: Path) -> dict[str, Any] | None:
    """Return the pooled fingerprint of a federation, or None if the sites have pooled none."""
    if not has_pooled_fingerprint(preprocessed_folder):
        return None
    content: dict[str, Any] = read_json(preprocessed_folder / FINGERPRINT_FILE)
    return content


def find_local_fingerprint(preprocessed_folder: Path) -> Path:
    """Return the file with the fingerprint of this site's own cases."""
    name = LOCAL_FINGERPRINT if has_pooled_fingerprint(preprocessed_folder) else FINGERPRINT_FILE
    return preprocessed_folder / name


def forget_pooled_fingerprint(preprocessed_folder: Path) -> None:
    """Note that FINGERPRINT_FILE holds this site's cases again."""
    (preprocessed_folder / LOCAL_FINGERPRINT).unlink(missing_ok=True)
