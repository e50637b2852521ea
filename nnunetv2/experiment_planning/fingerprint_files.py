"""Where the fingerprint of a dataset lies: alone, and beside the pooled one of a federation."""
from __future__ import annotations

from pathlib import Path

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import FINGERPRINT_FILE

LOCAL_FINGERPRINT = "dataset_fingerprint_local.json"
"""This site's own fingerprint, in folders where FINGERPRINT_FILE is the pooled one."""


def find_local_fingerprint(preprocessed_folder: Path) -> Path:
    """Return the file with the fingerprint of this site's own cases."""
    local = preprocessed_folder / LOCAL_FINGERPRINT
    return local if local.is_file() else preprocessed_folder / FINGERPRINT_FILE


def forget_pooled_fingerprint(preprocessed_folder: Path) -> None:
    """Note that FINGERPRINT_FILE holds this site's cases again."""
    (preprocessed_folder / LOCAL_FINGERPRINT).unlink(missing_ok=True)
