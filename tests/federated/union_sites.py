"""Phantoms of sites that annotate different classes, under numbers of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

WHOLE = {"organ": 1, "lesion": 2}
"""What the phantoms have, and its numbers there."""


def annotate(folder: Path, labels: Mapping[str, int]) -> None:
    """Let a raw dataset have these classes only, under these numbers."""
    file = folder / "dataset.json"
    for path in sorted((folder / "labelsTr").iterdir()):
        image = sitk.ReadImage(str(path))
        whole = sitk.GetArrayFromImage(image)
        own = np.zeros_like(whole)
        for name, value in labels.items():
            own[whole == WHOLE.get(name, -1)] = value
        written = sitk.GetImageFromArray(own)
        written.CopyInformation(image)
        sitk.WriteImage(written, str(path))
    description = json.loads(file.read_text())
    file.write_text(json.dumps({**description, "labels": {"background": 0, **labels}}))
