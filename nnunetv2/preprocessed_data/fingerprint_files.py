"""Name the files of a dataset's fingerprint.

Its own, and beside it the pooled one of a federation.
"""

from __future__ import annotations

from pathlib import Path

FINGERPRINT_FILE = "dataset_fingerprint.json"
LOCAL_FINGERPRINT = "dataset_fingerprint_local.json"
"""This site's own fingerprint, in folders where FINGERPRINT_FILE is the pooled one."""


def has_pooled_fingerprint(preprocessed_folder: Path) -> bool:
    """Tell whether FINGERPRINT_FILE is the pooled one."""
    return (preprocessed_folder / LOCAL_FINGERPRINT).is_file()


def find_local_fingerprint(preprocessed_folder: Path) -> Path:
    """Return the file with the fingerprint of this site's own cases."""
    name = LOCAL_FINGERPRINT if has_pooled_fingerprint(preprocessed_folder) else FINGERPRINT_FILE
    return preprocessed_folder / name


def forget_pooled_fingerprint(preprocessed_folder: Path) -> None:
    """Note that FINGERPRINT_FILE holds this site's cases again."""
    (preprocessed_folder / LOCAL_FINGERPRINT).unlink(missing_ok=True)
