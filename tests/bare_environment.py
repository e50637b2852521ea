"""Install this package, without its own requirements, into a virtual environment with those of a file in deploy/."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
OF_THE_INSTALLER = {"pip", "setuptools", "wheel"}
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def run(*command: object, **options) -> str:
    """Run a command and return its output; raise RuntimeError with it if the command fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def download_wheels(requirements: Path, folder: Path) -> None:
    """Download the wheels of a requirements file, or skip the test where no package index can be reached."""
    try:
        run(*_PIP, "download", "--only-binary", ":all:", "--dest", folder, "-r", requirements)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no package index can be reached: {str(error)[-300:]}")


def make_environment(folder: Path, requirements: Path, wheels: Path, scratch: Path) -> None:
    """Make a virtual environment with the wheels and this package, and nothing else."""
    venv.create(folder, with_pip=False, symlinks=True)
    source, own = scratch / "source", scratch / "own"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "nnunetv2", source / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    install = (*_PIP, "--python", folder / "bin" / "python", "install")
    run(*install, "--no-index", "--find-links", wheels, "-r", requirements)
    run(*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", own, source)
    run(*install, "--no-deps", "--no-index", *own.glob("*.whl"))


def list_packages(folder: Path) -> set[str]:
    """Return the names of the packages in a virtual environment, but those of the installer."""
    listed = run(*_PIP, "--python", folder / "bin" / "python", "list", "--format", "json")
    return {entry["name"] for entry in json.loads(listed)} - OF_THE_INSTALLER


def megabytes(folder: Path) -> float:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
