"""Which reader a dataset gets."""

import logging

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    determine_reader_writer_from_file_ending,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (".nii", NibabelIO),
        (".nii.gz", SimpleITKIO),
        (".NII.GZ", SimpleITKIO),
        (".nrrd", SimpleITKIO),
        (".png", NaturalImage2DIO),
        (".tif", NaturalImage2DIO),
        (".tiff", Tiff3DIO),
    ],
)
def test_ending_alone(ending, expected):
    assert determine_reader_writer_from_file_ending(ending) is expected


def test_example_tells_volumes_from_images(tmp_path):
    tifffile.imwrite(tmp_path / "a_0000.tif", np.zeros((5, 6, 7), np.uint8), photometric="minisblack")
    assert determine_reader_writer_from_file_ending(".tif", tmp_path / "a_0000.tif") is Tiff3DIO


def test_unknown_ending():
    with pytest.raises(RuntimeError, match=r"'\.xyz'"):
        determine_reader_writer_from_file_ending(".xyz")


def test_unreadable_example_says_why(tmp_path):
    (tmp_path / "a_0000.nii.gz").write_text("no image")
    with pytest.raises(RuntimeError, match="SimpleITKIO: .*NibabelIO: "):
        determine_reader_writer_from_file_ending(".nii.gz", str(tmp_path / "a_0000.nii.gz"))


def test_nonmatching_example_is_tried_if_allowed(tmp_path):
    file = str(tmp_path / "a_0000.mhd")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 7), np.uint8)), file)
    with pytest.raises(RuntimeError):
        determine_reader_writer_from_file_ending(".mhd", file)
    assert determine_reader_writer_from_file_ending(".mhd", file, allow_nonmatching_filename=True) is SimpleITKIO


def test_dataset_json_decides(caplog):
    caplog.set_level(logging.INFO)
    content = {"file_ending": ".nii.gz", "overwrite_image_reader_writer": "SimpleITKIOWithReorient"}
    assert determine_reader_writer_from_dataset_json(content) is SimpleITKIOWithReorient
    assert "SimpleITKIOWithReorient" in caplog.text
    for name in ("None", None):
        content["overwrite_image_reader_writer"] = name
        assert determine_reader_writer_from_dataset_json(content, verbose=False) is SimpleITKIO


def test_unknown_name_in_dataset_json_falls_back_to_the_ending(caplog):
    content = {"file_ending": ".nii", "overwrite_image_reader_writer": "TypoIO"}
    assert determine_reader_writer_from_dataset_json(content) is NibabelIO
    assert "TypoIO" in caplog.text


def test_unknown_name_alone():
    with pytest.raises(RuntimeError, match="TypoIO"):
        recursive_find_reader_writer_by_name("TypoIO")
