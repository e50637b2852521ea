"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# A shell lets its background processes ignore Ctrl-C, and all processes of ours would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch):
    """Keep the variables of the person who runs the tests out of them."""
    for name in list(os.environ):
        if name.startswith("nnUNet_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("nnUNet_fed_min_cases", "1")  # phantoms have nothing to hide


@pytest.fixture
def roots(tmp_path, monkeypatch) -> dict[str, Path]:
    """Create the three nnU-Net folders and point the environment at them."""
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return folders


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real scans, or skip: they are not part of the project."""
    folder = Path(os.environ.get("FEDNNUNET_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real scans not found in {folder}; set FEDNNUNET_DATA to their folder")
    return folder
