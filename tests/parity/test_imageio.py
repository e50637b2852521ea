"""Readers and writers beside the reference's: same arrays, same properties, same files."""

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image
from skimage import io

from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

# reads a case, writes its first channel as a label map, and returns everything but the file
CODE = """
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
answer = []
for number, (reader_name, files, output) in enumerate(value):
    reader = recursive_find_reader_writer_by_name(reader_name)()
    outputs[f"image{number}"], properties = reader.read_images(files)
    reader.write_seg(np.abs(outputs[f"image{number}"][0]) % 256, output, properties)
    outputs[f"spacing{number}"] = np.array(properties["spacing"])
    for group in ("sitk_stuff", "nibabel_stuff"):
        for key, entry in properties.get(group, {}).items():
            outputs[f"stuff_{key}{number}"] = np.array(entry)
"""


def make_files(folder):
    """Write or pick one case per reader and kind of file."""
    rng = np.random.default_rng(1)
    volume = rng.integers(-500, 900, (6, 7, 8)).astype(np.int16)
    cases = []

    def add(name, *readers):
        files = [str(file) for file in (name if isinstance(name, list) else [name])]
        cases.extend((reader, files) for reader in readers)

    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((0.8, 1.1, 3.3))
    image.SetOrigin((-3.0, 4.5, 100.0))
    image.SetDirection((0.0, -1.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0))
    for ending in ("nii.gz", "nrrd", "mha"):
        sitk.WriteImage(image, str(folder / f"a.{ending}"))
        add(folder / f"a.{ending}", "SimpleITKIO", "SimpleITKIOWithReorient")
    add([folder / "a.mha", folder / "a.nrrd"], "SimpleITKIO")
    sitk.WriteImage(sitk.GetImageFromArray(volume[0]), str(folder / "flat.mha"))
    add(folder / "flat.mha", "SimpleITKIO")
    scaled = nibabel.Nifti1Image(volume, nibabel.load(folder / "a.nii.gz").affine)
    scaled.header.set_slope_inter(0.37, -11.3)
    nibabel.save(scaled, folder / "scaled.nii")
    floating = nibabel.Nifti1Image(rng.normal(size=(4, 5, 6)).astype(np.float64), np.diag([-1, 2, -3, 1.0]))
    nibabel.save(floating, folder / "floating.nii.gz")
    add(folder / "a.nii.gz", "NibabelIO", "NibabelIOWithReorient")
    add(folder / "scaled.nii", "NibabelIO", "NibabelIOWithReorient")
    add(folder / "floating.nii.gz", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIO")
    for dtype in (np.uint8, np.float32):
        tifffile.imwrite(folder / f"t{np.dtype(dtype)}_0000.tif", volume.astype(dtype), photometric="minisblack")
        (folder / f"t{np.dtype(dtype)}.json").write_text('{"spacing": [3.5, 1, 2]}')
        add(folder / f"t{np.dtype(dtype)}_0000.tif", "Tiff3DIO")
    for name, shape in (("gray", (5, 6)), ("rgb", (5, 6, 3)), ("rgba", (5, 6, 4))):
        io.imsave(folder / f"{name}.png", rng.integers(0, 255, shape, dtype=np.uint8), check_contrast=False)
        add(folder / f"{name}.png", "NaturalImage2DIO")
    io.imsave(folder / "gray16.png", rng.integers(0, 60000, (5, 6), dtype=np.uint16), check_contrast=False)
    io.imsave(folder / "floating.tif", rng.normal(size=(5, 6)).astype(np.float32), check_contrast=False)
    Image.fromarray(np.eye(5, 6, dtype=bool)).save(folder / "bits.png")
    palette = Image.fromarray(rng.integers(0, 3, (5, 6), dtype=np.uint8), "L").convert("P")
    palette.save(folder / "palette.png")
    for name in ("gray16.png", "floating.tif", "bits.png", "palette.png"):
        add(folder / name, "NaturalImage2DIO")
    add_odd_nifti(folder, rng, add)
    return cases


def add_odd_nifti(folder, rng, add):
    """2D, oblique, left-handed and float NIfTI, one with NaN, of which ITK makes 0."""
    sitk.WriteImage(sitk.GetImageFromArray(rng.normal(size=(5, 6)).astype(np.float32)), str(folder / "flat.nii.gz"))
    add(folder / "flat.nii.gz", "SimpleITKIO")
    c, s = np.cos(0.4), np.sin(0.4)
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    labels = rng.integers(0, 3, (6, 7, 8)).astype(np.float64)
    for name, axes in (("oblique", turned), ("mirrored", turned * [1, 1, -1]), ("permuted", turned[:, [2, 0, 1]])):
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = axes * [0.8, 1.1, 3.3], (-3, 4.5, 100)
        nibabel.save(nibabel.Nifti1Image(labels, affine), folder / f"{name}.nii.gz")
        add(folder / f"{name}.nii.gz", "SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
    labels[2, 3, 4] = np.nan
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / "nan.nii.gz")
    add(folder / "nan.nii.gz", "SimpleITKIO")


def list_real_scans(shared_data):
    """Return (reader, files) for a scan of each kind in the shared data, and for all odd ones."""
    volumes = ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"]
    hippocampus = sorted((shared_data / "hippocampus").glob("*/*_03*.nii.gz"))[:8]
    cord = [
        file
        for site in ("ucl", "nwu", "chum", "juntendo", "milan", "ceitec")
        for kind in ("images", "labels")
        for file in sorted((shared_data / "spinalcord" / site / kind).glob("*.nii.gz"))[:1]
    ]
    odd = sorted(file for file in (shared_data / "odd").glob("*.nii.gz") if file.name != "sct_dmri.nii.gz")
    cases = [(reader, [str(file)]) for file in (*hippocampus, *cord, *odd) for reader in volumes]
    nrrd = sorted((shared_data / "odd").glob("*.nrrd"))
    cases += [(reader, [str(file)]) for file in nrrd for reader in ("SimpleITKIO", "SimpleITKIOWithReorient")]
    photographs = [
        file
        for site in ("chasedb1", "hrf")
        for kind in ("images", "labels", "masks")
        for file in sorted((shared_data / "retina" / site / kind).iterdir())[:1]
    ]
    return cases + [("NaturalImage2DIO", [str(file)]) for file in photographs]


def test_all_readers_and_writers(reference, tmp_path):
    compare(make_files(tmp_path), reference, tmp_path)


def test_real_scans(reference, tmp_path, shared_data):
    compare(list_real_scans(shared_data), reference, tmp_path)


def test_real_series(reference, tmp_path, shared_data):
    """A series is read alike; as a label map only we can write it."""
    file = str(shared_data / "odd" / "sct_dmri.nii.gz")
    theirs, _ = reference.run(
        """
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
outputs["image"], properties = SimpleITKIO().read_images([value])
outputs["spacing"] = np.array(properties["spacing"])
""",
        value=file,
    )
    image, properties = recursive_find_reader_writer_by_name("SimpleITKIO")().read_images([file])
    np.testing.assert_array_equal(image, theirs["image"])
    np.testing.assert_array_equal(properties["spacing"], theirs["spacing"])


def compare(cases, reference, tmp_path):
    """Read and write cases on both sides and compare arrays, properties and written files."""
    folders = {name: tmp_path / name for name in ("ours", "theirs")}
    for folder in folders.values():
        folder.mkdir()
    jobs = {
        name: [
            (reader, files, f"{folder}/{number}{ending_of(files[0])}") for number, (reader, files) in enumerate(cases)
        ]
        for name, folder in folders.items()
    }
    theirs, _ = reference.run(CODE, value=jobs["theirs"])
    for number, (reader_name, files, output) in enumerate(jobs["ours"]):
        reader = recursive_find_reader_writer_by_name(reader_name)()
        image, properties = reader.read_images(files)
        reader.write_seg(np.abs(image[0]) % 256, output, properties)
        assert image.dtype == theirs[f"image{number}"].dtype
        np.testing.assert_array_equal(image, theirs[f"image{number}"], err_msg=f"{reader_name} {files}")
        np.testing.assert_array_equal(properties["spacing"], theirs[f"spacing{number}"])
        for group in ("sitk_stuff", "nibabel_stuff"):
            for key, entry in properties.get(group, {}).items():
                np.testing.assert_array_equal(entry, theirs[f"stuff_{key}{number}"], err_msg=f"{reader_name} {key}")
        assert_same_file(output, jobs["theirs"][number][2], same_type=reader_name != "SimpleITKIOWithReorient")


def ending_of(file):
    endings = (".nii.gz", ".nii", ".nrrd", ".mha", ".tif", ".png", ".jpg")
    # label maps must not be stored with loss
    return next(ending for ending in endings if file.endswith(ending)).replace(".jpg", ".png")


def assert_same_file(ours, theirs, same_type):
    """Compare two label maps. The reference's reorienting ITK writer keeps the low 8 bits only."""
    if ours.endswith((".png", ".tif")):
        arrays = [tifffile.imread(file) if file.endswith(".tif") else io.imread(file) for file in (ours, theirs)]
    else:
        images = [sitk.ReadImage(file) for file in (ours, theirs)]
        for getter in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(images[0], getter)() == getattr(images[1], getter)(), (ours, getter)
        arrays = [sitk.GetArrayFromImage(image) for image in images]
    np.testing.assert_array_equal(*(array.astype(np.uint8) for array in arrays))
    if same_type:
        assert arrays[0].dtype == arrays[1].dtype
