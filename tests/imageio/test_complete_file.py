"""Tests of noticing NIfTI files that were cut short."""
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nnunetv2.imageio.complete_file import require_complete_nifti
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

PROPERTIES = {"sitk_stuff": {"spacing": (1.0, 1.0, 1.0), "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())},
              "nibabel_stuff": {"original_affine": np.eye(4)}}


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 3, (40, 41, 42)).astype(np.uint8)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("writer", [SimpleITKIO, NibabelIO])
def test_a_whole_file_passes_and_a_part_of_it_does_not(tmp_path, noise, writer, ending):
    path = tmp_path / f"case{ending}"
    writer().write_seg(noise, str(path), PROPERTIES)
    require_complete_nifti(path)
    content = path.read_bytes()
    for length in (0, 50, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:length])
        with pytest.raises(OSError, match="is the disk full"):
            require_complete_nifti(path)


def test_other_formats_are_not_looked_at(tmp_path):
    require_complete_nifti(tmp_path / "case.nrrd")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_file_that_does_not_fit_is_reported_and_not_left_behind(tmp_path, ending):
    code = f"""
import resource, signal
import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
noise = np.random.default_rng(0).integers(0, 3, (40, 41, 42)).astype(np.uint8)
stuff = dict(spacing=(1.0, 1.0, 1.0), origin=(0.0,) * 3, direction=tuple(np.eye(3).ravel()))
SimpleITKIO().write_seg(noise, {str(tmp_path / f"case{ending}")!r}, dict(sitk_stuff=stuff))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Error" in done.stderr
    assert not list(tmp_path.iterdir())
