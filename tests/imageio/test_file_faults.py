"""Files that image libraries read without complaint although something is wrong with them."""

import gzip
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2.imageio.faults import DamagedFileError, find_damage, find_faults_in_nifti, require_complete
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

NOISE = np.random.default_rng(0).integers(0, 200, (6, 30, 40)).astype(np.int16)
HEADER = 352


def write(file, voxels=NOISE, compress=True):
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(file), compress)
    return str(file)


def cut(file, num_bytes):
    with open(file, "r+b") as stream:  # noqa: PTH123
        stream.seek(0, 2)
        stream.truncate(stream.tell() - num_bytes)
    return str(file)


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".gipl"])
@pytest.mark.parametrize("missing", [20, 3000])
def test_cut_files_are_refused_by_name(tmp_path, reader, ending, missing):
    file = cut(write(tmp_path / f"a{ending}"), missing)
    with pytest.raises(RuntimeError, match=rf"a\{ending}.*(cut short|damaged)"):
        reader().read_images([file])


@pytest.mark.parametrize("missing", [9, 20, 3000])
@pytest.mark.parametrize("reader", [NibabelIO, NibabelIOWithReorient])
def test_cut_nifti_is_refused_by_nibabel_readers(tmp_path, reader, missing):
    file = cut(write(tmp_path / "a.nii.gz"), missing + 3000)
    with pytest.raises(RuntimeError, match=r"a\.nii\.gz cannot be read"):
        reader().read_images([file])


@pytest.mark.parametrize(("ending", "compress"), [(".nii.gz", True), (".nii", False), (".gipl", False)])
def test_complete_files_pass_without_being_decompressed(tmp_path, ending, compress, monkeypatch):
    file = write(tmp_path / f"a{ending}", compress=compress)
    monkeypatch.setattr("nnunetv2.imageio.faults._decompressed", lambda file: pytest.fail("decompressed"))
    require_complete(file, NOISE.size * 2 + (256 if ending == ".gipl" else HEADER))


def test_gzip_files_of_several_parts_and_with_padding_pass(tmp_path):
    content = gzip.decompress(open(write(tmp_path / "a.nii.gz"), "rb").read())  # noqa: PTH123, SIM115
    file = tmp_path / "parts.nii.gz"
    file.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:] + bytes(100)))
    data, _ = SimpleITKIO().read_images([file])
    assert np.array_equal(data[0], NOISE)


def test_uncompressed_content_under_a_compressed_name_passes(tmp_path):
    content = gzip.decompress(open(write(tmp_path / "a.nii.gz"), "rb").read())  # noqa: PTH123, SIM115
    (tmp_path / "b.nii.gz").write_bytes(content)
    assert np.array_equal(SimpleITKIO().read_images([tmp_path / "b.nii.gz"])[0][0], NOISE)
    (tmp_path / "b.nii.gz").write_bytes(content[:-1])
    with pytest.raises(DamagedFileError, match="it holds 14751 bytes, its header announces 14752"):
        SimpleITKIO().read_images([tmp_path / "b.nii.gz"])


def test_scaled_and_extended_nifti_pass(tmp_path):
    image = nibabel.Nifti1Image(NOISE.T, np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 777))
    nibabel.save(image, tmp_path / "a.nii.gz")
    data, _ = SimpleITKIO().read_images([tmp_path / "a.nii.gz"])
    assert np.allclose(data[0], nibabel.load(tmp_path / "a.nii.gz").get_fdata().T)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_nan_that_itk_hides_is_found(tmp_path, ending, kind, dtype):
    voxels = np.ones((9, 8, 7), dtype)
    voxels[0, 0, 0], voxels[-1, -1, -1], voxels[4, 4, 4] = np.nan, np.inf, -np.inf
    file = str(tmp_path / f"a{ending}")
    nibabel.save(kind(voxels, np.eye(4)), file)
    (fault,) = SimpleITKIO().find_faults(file)
    assert (fault.what, fault.found) == ("NaN or infinite values", "3 voxels")


def test_nan_is_found_across_chunks(tmp_path, monkeypatch):
    voxels = np.ones((5, 6, 7), np.float64)
    voxels[::2, 1, 3] = np.nan
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 777))
    nibabel.save(image, tmp_path / "a.nii.gz")
    for size in (349, 353, 1021):
        monkeypatch.setattr("nnunetv2.imageio.faults._BYTES_AT_ONCE", size)
        assert [fault.found for fault in find_faults_in_nifti(str(tmp_path / "a.nii.gz"))] == ["3 voxels"]


def test_itk_puts_0_in_the_place_of_nan(tmp_path):
    """Why NaN has to be looked for in the file. Existing datasets have NaN around the body, and train well with 0."""
    voxels = np.ones((9, 8, 7), np.float32)
    voxels[0, 0, 0] = np.nan
    data, _ = SimpleITKIO().read_images([write(tmp_path / "a.nii.gz", voxels)])
    assert data[0, 0, 0, 0] == 0
    data, _ = SimpleITKIO().read_images([write(tmp_path / "a.nrrd", voxels)])
    assert np.isnan(data[0, 0, 0, 0])


def test_whole_numbers_are_never_nan(tmp_path):
    assert SimpleITKIO().find_faults(write(tmp_path / "a.nii.gz")) == []
    assert NibabelIO().find_faults(write(tmp_path / "a.nii")) == []


def test_wrong_checksums_are_found(tmp_path):
    file = write(tmp_path / "a.nii.gz")
    content = bytearray(open(file, "rb").read())  # noqa: PTH123, SIM115
    content[-6] ^= 0xFF
    (tmp_path / "a.nii.gz").write_bytes(content)
    for reader in (SimpleITKIO, NibabelIO):
        assert reader().find_faults(file)[0].what == "damaged file"
    assert "CRC" in find_damage(file)[0].found


def test_tif_without_spacing_is_a_fault(tmp_path):
    assert Tiff3DIO().find_faults(str(tmp_path / "c_0001.tif"))[0].expected == "c.json"
    assert Tiff3DIO().find_faults(tmp_path / "c.tif", is_label=True)[0].expected == "c.json"
    (tmp_path / "c.json").write_text("")
    assert not Tiff3DIO().find_faults(tmp_path / "c_0001.tif")


FULL_DISK = """
import resource, sys
import numpy as np
from nnunetv2.imageio.{module} import {writer}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
seg = np.random.default_rng(0).integers(0, 200, (60, 30, 40))
geometry = {{"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}}
properties = {{"sitk_stuff": geometry, "spacing": [1, 1, 1], "nibabel_stuff": {{"original_affine": np.eye(4)}}}}
try:
    {writer}().write_seg(seg, sys.argv[1], properties)
except (OSError, RuntimeError) as error:
    print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize(
    ("module", "writer", "name"),
    [
        ("simpleitk_reader_writer", "SimpleITKIO", "a.nii.gz"),
        ("simpleitk_reader_writer", "SimpleITKIO", "a.nrrd"),
        ("simpleitk_reader_writer", "SimpleITKIO", "a.mha"),
        ("simpleitk_reader_writer", "SimpleITKIO", "a.gipl"),
        ("simpleitk_reader_writer", "SimpleITKIO", "a.nii"),
        ("nibabel_reader_writer", "NibabelIO", "a.nii.gz"),
        ("tif_reader_writer", "Tiff3DIO", "a.tif"),
    ],
)
def test_label_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path, module, writer, name):
    target = tmp_path / name
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK.format(module=module, writer=writer), str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "refused:" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def write_forms(file, qform, sform, codes=(1, 2), shape=(4, 5, 6)):
    image = nibabel.Nifti1Image(np.zeros(shape, np.int16), None)
    image.header.set_qform(qform, codes[0])
    image.header.set_sform(sform, codes[1])
    nibabel.save(image, file)
    return str(file)


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize("shape", [(4, 5, 6), (40, 50)])
def test_forms_that_disagree_are_worth_a_warning(tmp_path, reader, shape):
    moved = np.eye(4)
    moved[0, 3] = 30
    (fault,) = reader().find_faults(write_forms(tmp_path / "a.nii.gz", np.eye(4), moved, shape=shape))
    assert (fault.what, fault.found, fault.is_error) == (
        "qform and sform of a header disagree",
        "up to 30 mm apart",
        False,
    )


@pytest.mark.parametrize("codes", [(0, 2), (1, 0), (1, 1)])
def test_forms_that_agree_or_of_which_one_is_unset_pass(tmp_path, codes):
    other = np.eye(4)
    other[0, 3] = 0.1 if all(codes) else 30  # rounding
    assert SimpleITKIO().find_faults(write_forms(tmp_path / "a.nii.gz", np.eye(4), other, codes)) == []
