"""Write arrays as scans, for the tests of planning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_nifti(array: np.ndarray, file: Path, spacing: Sequence[float] = (3.0, 1.5, 1.0)) -> None:
    """Write an array (z, y, x) with its spacing in the same order."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing][::-1])
    SimpleITK.WriteImage(image, str(file))
