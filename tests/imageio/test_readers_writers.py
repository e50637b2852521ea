"""Files to arrays and back, for every reader. All sides are unequal, so that swapped axes show."""

import json
import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from skimage import io

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

SHAPE = (3, 4, 5)  # z, y, x
VOLUME = np.arange(60, dtype=np.int16).reshape(SHAPE)
# 90 degrees about z, then x mirrored: no axis stays where it was
TURNED = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@pytest.fixture
def write_itk(tmp_path):
    """Write an array as an image file and return its path."""

    def write(
        name="case_0000.nii.gz",
        voxels=VOLUME,
        spacing=(1.0, 2.0, 3.5),
        origin=(7.0, 8.0, 9.0),
        direction=None,
        **kwargs,
    ):
        image = sitk.GetImageFromArray(voxels, **kwargs)
        dim = image.GetDimension()
        image.SetSpacing((*spacing, 1.0)[:dim])
        image.SetOrigin((*origin, 0.0)[:dim])
        if direction is not None:
            image.SetDirection(direction)
        sitk.WriteImage(image, str(tmp_path / name))
        return str(tmp_path / name)

    return write


def geometry(file):
    image = sitk.ReadImage(str(file))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def itk_stuff(file):
    _, spacing, origin, direction = geometry(file)
    return {"spacing": spacing, "origin": origin, "direction": direction}


# SimpleITK


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha", "a.gipl"])
def test_itk_volume(write_itk, name):
    file = write_itk(name)
    data, properties = SimpleITKIO().read_images([file])
    assert data.dtype == np.float32 and np.array_equal(data, VOLUME[None])
    assert properties["spacing"] == [3.5, 2.0, 1.0] and type(properties["spacing"][0]) is np.float64
    assert properties["sitk_stuff"] == itk_stuff(file)


def test_itk_channels_keep_the_order_of_the_files(write_itk):
    files = [write_itk("b_0000.mha", VOLUME + 1), write_itk("b_0001.mha", VOLUME)]
    data, _ = SimpleITKIO().read_images(files)
    assert data.shape == (2, *SHAPE) and data[:, 0, 0, 0].tolist() == [1, 0]


def test_itk_slice_gets_a_coarse_first_axis(write_itk, tmp_path):
    file = write_itk("a.mha", VOLUME[0], spacing=(0.5, 2.0))
    data, properties = SimpleITKIO().read_images([file])
    assert data.shape == (1, 1, 4, 5)
    assert properties["spacing"] == [1998.0, 2.0, 0.5]
    SimpleITKIO().write_seg(np.ones((1, 4, 5)), tmp_path / "seg.mha", properties)
    assert geometry(tmp_path / "seg.mha") == geometry(file)


def test_itk_series_is_read_as_channels_and_labels_written_in_3d(write_itk, tmp_path):
    file = write_itk("a.nrrd", np.stack([VOLUME, VOLUME + 1]), direction=np.eye(4).ravel().tolist(), isVector=False)
    data, properties = SimpleITKIO().read_images([file])
    assert data.shape == (2, *SHAPE) and properties["spacing"] == [3.5, 2.0, 1.0]
    SimpleITKIO().write_seg(VOLUME, tmp_path / "seg.nrrd", properties)
    assert geometry(tmp_path / "seg.nrrd")[:3] == ((5, 4, 3), (1.0, 2.0, 3.5), (7.0, 8.0, 9.0))
    with pytest.raises(RuntimeError, match="2 channels"):
        SimpleITKIO().read_seg(file)


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient])
def test_itk_geometry_survives(write_itk, tmp_path, reader):
    file = write_itk(direction=TURNED)
    seg, properties = reader().read_seg(file)
    assert seg.dtype == np.float32 and seg.shape[0] == 1
    reader().write_seg(seg[0], tmp_path / "out.nii.gz", properties)
    written, _ = SimpleITKIO().read_seg(tmp_path / "out.nii.gz")
    assert np.array_equal(written, VOLUME[None])
    for ours, theirs in zip(geometry(tmp_path / "out.nii.gz"), geometry(file)):
        assert ours == pytest.approx(theirs)


def test_reorientation_brings_axes_into_ras(write_itk):
    data, properties = SimpleITKIOWithReorient().read_images([write_itk(direction=TURNED)])
    assert properties["sitk_stuff"]["direction"] == pytest.approx((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    assert properties["sitk_stuff"]["original_orientation"] == "PLI"
    assert data.shape == (1, 3, 5, 4) and properties["spacing"] == [3.5, 1.0, 2.0]
    left, _ = SimpleITKIOWithReorient().read_images([write_itk(direction=TURNED)], orientation="PLI")
    assert np.array_equal(left, VOLUME[None])


def test_reorienting_reader_passes_slices_through(write_itk, tmp_path):
    file = write_itk("a.mha", VOLUME[0])
    data, properties = SimpleITKIOWithReorient().read_images([file])
    SimpleITKIOWithReorient().write_seg(data[0], tmp_path / "out.mha", properties)
    assert geometry(tmp_path / "out.mha") == geometry(file)


def test_itk_colours_are_refused(write_itk):
    file = write_itk("a.mha", np.zeros((4, 5, 3), np.uint8), isVector=True)
    with pytest.raises(RuntimeError, match=r"a\.mha has 3 values per voxel"):
        SimpleITKIO().read_images([file])


def test_itk_disagreements(write_itk, caplog):
    first = write_itk("a_0000.mha")
    read = SimpleITKIO().read_images
    with pytest.raises(RuntimeError, match=r"shape.*a_0001\.mha has \[3, 4, 4\]"):
        read([first, write_itk("a_0001.mha", VOLUME[..., 1:])])
    with pytest.raises(RuntimeError, match="differ in spacing"):
        read([first, write_itk("a_0001.mha", spacing=(1.0, 2.0, 3.6))])
    assert not caplog.text
    read([first, write_itk("a_0001.mha", origin=(7.0, 8.0, 9.1))])
    assert "differ in origin" in caplog.text
    read([first, write_itk("a_0001.mha", direction=TURNED)])
    assert "differ in direction" in caplog.text
    with pytest.raises(RuntimeError, match="differ in spacing"):
        read([write_itk("a_0000.mha", VOLUME[:1]), write_itk("a_0001.mha", VOLUME[0])])


# nibabel


def write_nifti(path, voxels=VOLUME, affine=None):
    affine = np.array([[0, -2.0, 0, 5], [1, 0, 0, 6], [0, 0, 3.5, 7], [0, 0, 0, 1]]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(voxels.T, affine), path)
    return path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_as_it_lies_in_the_file(tmp_path, ending):
    file = write_nifti(tmp_path / f"a{ending}")
    data, properties = NibabelIO().read_images([file])
    assert data.dtype == np.float32 and np.array_equal(data, VOLUME[None])
    assert properties["spacing"] == [3.5, 2.0, 1.0]
    assert np.array_equal(properties["nibabel_stuff"]["original_affine"], nibabel.load(file).affine)


def test_nifti_towards_ras(tmp_path):
    data, properties = NibabelIOWithReorient().read_images([write_nifti(tmp_path / "a.nii")])
    assert nibabel.aff2axcodes(properties["nibabel_stuff"]["reoriented_affine"]) == ("R", "A", "S")
    assert data.shape == (1, 3, 5, 4) and properties["spacing"] == [3.5, 1.0, 2.0]
    assert np.array_equal(data[0], VOLUME.transpose(0, 2, 1)[:, :, ::-1])


@pytest.mark.parametrize("reader", [NibabelIO, NibabelIOWithReorient])
def test_nifti_geometry_survives(tmp_path, reader, caplog):
    # oblique: 20 degrees about x, axes permuted and flipped
    c, s = np.cos(0.35), np.sin(0.35)
    affine = np.array([[0, -2.0, 0, 5], [c, 0, -s * 3.5, 6], [s, 0, c * 3.5, 7], [0, 0, 0, 1]])
    file = write_nifti(tmp_path / "a.nii.gz", affine=affine)
    seg, properties = reader().read_seg(file)
    reader().write_seg(seg[0], tmp_path / "out.nii.gz", properties)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert np.allclose(written.affine, nibabel.load(file).affine)
    assert np.array_equal(np.asarray(written.dataobj), VOLUME.T) and written.get_data_dtype() == np.uint8
    assert not caplog.text


def test_nifti_of_other_ranks_is_refused(tmp_path):
    file = write_nifti(tmp_path / "a.nii", np.zeros((2, *SHAPE)))
    for reader in (NibabelIO, NibabelIOWithReorient):
        with pytest.raises(AssertionError, match=r"a\.nii has 4 dimensions"):
            reader().read_images([file])


def test_nifti_disagreements(tmp_path, caplog):
    first = write_nifti(tmp_path / "a_0000.nii", affine=np.diag([1.0, 2, 3, 1]))
    second = tmp_path / "a_0001.nii"
    with pytest.raises(RuntimeError, match="differ in spacing"):
        NibabelIO().read_images([first, write_nifti(second, affine=np.diag([1.0, 2, 4, 1]))])
    caplog.clear()
    NibabelIO().read_images([first, write_nifti(second, affine=np.diag([-1.0, 2, 3, 1]))])
    assert "differ in affine" in caplog.text
    with pytest.raises(RuntimeError, match="differ in shape"):
        NibabelIO().read_images([first, write_nifti(second, VOLUME[1:])])


# 2D images


def test_gray_image(tmp_path):
    io.imsave(tmp_path / "a.png", VOLUME[0].astype(np.uint8), check_contrast=False)
    data, properties = NaturalImage2DIO().read_images([tmp_path / "a.png"])
    assert data.dtype == np.float32 and np.array_equal(data, VOLUME[None, :1])
    assert properties == {"spacing": (999, 1, 1)}


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_become_channels(tmp_path, channels):
    colours = np.arange(20 * channels, dtype=np.uint8).reshape(4, 5, channels)
    io.imsave(tmp_path / "a.png", colours, check_contrast=False)
    data, _ = NaturalImage2DIO().read_images([tmp_path / "a.png"])
    assert np.array_equal(data[:, 0], colours.transpose(2, 0, 1))
    with pytest.raises(RuntimeError, match=f"{channels} channels"):
        NaturalImage2DIO().read_seg(tmp_path / "a.png")


@pytest.mark.parametrize("ending", NaturalImage2DIO.supported_file_endings)
def test_2d_labels_round_trip(tmp_path, ending):
    seg = np.arange(42).reshape(1, 6, 7)
    NaturalImage2DIO().write_seg(seg, tmp_path / f"a{ending}", {})
    assert np.array_equal(NaturalImage2DIO().read_seg(tmp_path / f"a{ending}")[0], seg[None])


def test_volumes_are_no_2d_images(tmp_path):
    # with 3 or 4 pages, or columns, it would pass for colours
    write_tif(tmp_path / "a.tif", np.zeros((5, 6, 7), np.uint8))
    with pytest.raises(AssertionError, match=r"a\.tif has shape \(5, 6, 7\)"):
        NaturalImage2DIO().read_images([tmp_path / "a.tif"])


# 3D tif


def write_tif(path, voxels=VOLUME):
    tifffile.imwrite(path, voxels, photometric="minisblack")
    return path


def test_tif_takes_its_spacing_from_the_file_of_the_case(tmp_path):
    files = [write_tif(tmp_path / "c_0000.tif"), write_tif(tmp_path / "c_0001.tif", VOLUME + 1)]
    (tmp_path / "c.json").write_text('{"spacing": [3, 1.5, 2]}')
    data, properties = Tiff3DIO().read_images(files)
    assert data.dtype == np.float32 and np.array_equal(data, [VOLUME, VOLUME + 1])
    assert properties == {"spacing": [3, 1.5, 2]}


def test_tif_without_spacing(tmp_path, caplog):
    assert Tiff3DIO().read_seg(write_tif(tmp_path / "c.TIF"))[1] == {"spacing": (1, 1, 1)}
    assert "c.json" in caplog.text


def test_tif_round_trip(tmp_path):
    # the last axis has as many entries as a colour
    seg = VOLUME.transpose(2, 1, 0)
    Tiff3DIO().write_seg(seg, tmp_path / "c.tif", {"spacing": [np.float64(3), 1, 2]})
    assert json.loads((tmp_path / "c.json").read_text()) == {"spacing": [3, 1, 2]}
    read, properties = Tiff3DIO().read_seg(str(tmp_path / "c.tif"))
    assert read.dtype == np.float32 and np.array_equal(read, seg[None]) and properties["spacing"] == [3, 1, 2]
    assert sorted(os.listdir(tmp_path)) == ["c.json", "c.tif"]  # noqa: PTH208


def test_tif_that_cannot_be_read(tmp_path):
    with pytest.raises(RuntimeError, match="2 axes"):
        Tiff3DIO().read_images([write_tif(tmp_path / "c_0000.tif", VOLUME[0])])
    with pytest.raises(AssertionError, match="must end in"):
        Tiff3DIO().read_images([write_tif(tmp_path / "c_0000.png")])
    for content in ("[1, 2]", "[0, 1, 1]"):
        (tmp_path / "c.json").write_text(f'{{"spacing": {content}}}')
        with pytest.raises(AssertionError, match="spacing"):
            Tiff3DIO().read_seg(write_tif(tmp_path / "c.tif"))


# what all have in common

WRITERS = [
    (NaturalImage2DIO, ".png", {}),
    (Tiff3DIO, ".tif", {"spacing": (1, 1, 1)}),
    (NibabelIO, ".nii.gz", {"nibabel_stuff": {"original_affine": np.eye(4)}}),
    (NibabelIOWithReorient, ".nii", {"nibabel_stuff": {"original_affine": np.eye(4), "reoriented_affine": np.eye(4)}}),
    (
        SimpleITKIO,
        ".mha",
        {"sitk_stuff": {"spacing": (1.0, 1.0, 1.0), "origin": (0.0, 0.0, 0.0), "direction": tuple(np.eye(3).ravel())}},
    ),
    (
        SimpleITKIOWithReorient,
        ".nrrd",
        {
            "sitk_stuff": {
                "spacing": (1.0, 1.0, 1.0),
                "origin": (0.0, 0.0, 0.0),
                "direction": tuple(np.eye(3).ravel()),
                "original_orientation": "RAI",
            }
        },
    ),
]


@pytest.mark.parametrize(("writer", "ending", "properties"), WRITERS)
@pytest.mark.parametrize("highest", [1, 254, 255, 300, 65535])
def test_labels_of_any_height_survive(tmp_path, writer, ending, properties, highest):
    seg = np.zeros((1, 4, 5), np.int32)
    seg[0, 1, 2] = highest
    writer().write_seg(seg, tmp_path / f"a{ending}", properties)
    assert writer().read_seg(tmp_path / f"a{ending}")[0].max() == highest


@pytest.mark.parametrize(("writer", "ending", "properties"), WRITERS)
@pytest.mark.parametrize(("highest", "bits"), [(254, 8), (255, 16)])
def test_labels_are_written_in_the_smallest_type(tmp_path, writer, ending, properties, highest, bits):
    writer().write_seg(np.full((1, 4, 5), highest, np.float32), tmp_path / f"a{ending}", properties)
    file = str(tmp_path / f"a{ending}")
    dtype = {".png": lambda: io.imread(file).dtype, ".tif": lambda: tifffile.imread(file).dtype}.get(
        ending, lambda: sitk.GetArrayFromImage(sitk.ReadImage(file)).dtype
    )()
    assert dtype == f"uint{bits}"


@pytest.mark.parametrize(("writer", "ending", "properties"), WRITERS)
def test_failed_writing_leaves_the_old_file(tmp_path, writer, ending, properties):
    file = tmp_path / f"a{ending}"
    file.write_text("old")
    with pytest.raises(Exception):  # noqa: B017, PT011 (each library has its own)
        writer().write_seg(np.full((1, 4, 5), "text", dtype=object), file, properties)
    assert [path.name for path in tmp_path.iterdir()] == [file.name] and file.read_text() == "old"


@pytest.mark.parametrize("reader", [writer for writer, *_ in WRITERS])
def test_missing_and_wrong_arguments_are_named(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_file"):
        reader().read_images([tmp_path / "no_such_file_0000.tif"])
    with pytest.raises(TypeError, match="list of files"):
        reader().read_images(str(tmp_path / "a_0000.tif"))
    with pytest.raises(ValueError, match="empty list"):
        reader().read_images([])


def test_own_readers_need_three_methods():
    class Half(BaseReaderWriter):
        def read_images(self, image_fnames):
            return None

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_comparison_helpers():
    assert BaseReaderWriter._check_all_same([(1, 2)]) and BaseReaderWriter._check_all_same([(1, 2), (1, 2 + 1e-9)])
    assert not BaseReaderWriter._check_all_same([(1, 2), (1, 2), (1, 3)])
    assert BaseReaderWriter._check_all_same_array([np.eye(2), np.eye(2)])
    assert not BaseReaderWriter._check_all_same_array([np.eye(2), np.eye(3)])


# Things that are no fault of the file format


@pytest.mark.parametrize("writer", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient])
def test_properties_of_another_reader_are_refused(writer, tmp_path):
    with pytest.raises(ValueError, match=rf"were not made by {writer.__name__}.*'spacing', 'other_stuff'"):
        writer().write_seg(np.zeros(SHAPE, np.uint8), tmp_path / "a.nii.gz", {"spacing": (1, 1, 1), "other_stuff": {}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient])
def test_labels_in_layers_get_a_remedy_for_labels(write_itk, reader):
    file = write_itk("case.seg.nrrd", np.zeros((*SHAPE, 2), np.uint8), isVector=True)
    with pytest.raises(RuntimeError, match="case.seg.nrrd has 2 values per voxel, but a label map.*3D Slicer"):
        reader().read_seg(file)


@pytest.mark.parametrize("ending", [".png", ".bmp"])
@pytest.mark.parametrize("transparency", [{}, {"transparency": 0}])
def test_labels_in_a_palette_are_its_numbers(tmp_path, ending, transparency):
    from PIL import Image

    numbers = np.array([[0, 1, 2, 255], [3, 0, 1, 1]], np.uint8)
    image = Image.frombytes("P", (4, 2), numbers.tobytes())
    image.putpalette([channel for i in range(256) for channel in (i, 255 - i, i * 7 % 256)])
    image.save(tmp_path / f"a{ending}", **(transparency if ending == ".png" else {}))
    seg, properties = NaturalImage2DIO().read_seg(tmp_path / f"a{ending}")
    assert seg.dtype == np.float32
    assert np.array_equal(seg, numbers[None, None])
    assert properties["spacing"] == (999, 1, 1)


def test_labels_in_colours_are_refused(tmp_path):
    io.imsave(tmp_path / "a.png", np.zeros((4, 5, 3), np.uint8), check_contrast=False)
    with pytest.raises(RuntimeError, match="a.png has 3 channels; a label map must have one.*not in colours"):
        NaturalImage2DIO().read_seg(tmp_path / "a.png")
