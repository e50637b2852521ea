"""Know the folders outside of the package that hold a user's own modules, from nnUNet_extTrainer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.paths import nnUNet_extTrainer

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


def external_folders() -> list[str]:
    """Return the existing folders of nnUNet_extTrainer in their order."""
    folders = (nnUNet_extTrainer.get() or "").split(os.pathsep)
    return [folder for folder in folders if folder and Path(folder).is_dir()]


def keep_importable(folder: str) -> None:
    """Leave a folder in `sys.path`, which spawned processes inherit: behind the libraries, before its peers."""
    if folder in sys.path:
        sys.path.remove(folder)
    peers = [sys.path.index(other) for other in external_folders() if other in sys.path]
    sys.path.insert(min(peers, default=len(sys.path)), folder)


def folder_of(spec: ModuleSpec | None) -> str | None:
    """Return the external folder of a top-level module or package.

    None if it stands elsewhere.

    Below is not enough: a home folder may hold an environment with all its libraries.
    """
    if spec is None:
        return None
    places = spec.submodule_search_locations or ([spec.origin] if spec.has_location else [])
    parents = {os.path.realpath(Path(place).parent) for place in places}
    return next((folder for folder in external_folders() if os.path.realpath(folder) in parents), None)
