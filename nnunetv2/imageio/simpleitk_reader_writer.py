"""Read and write medical images with SimpleITK.

ITK lists spacing, origin and direction with the fastest array axis first, the reverse of the array's axes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter, FilePath
from nnunetv2.imageio.channels import (
    as_labels,
    list_files,
    require_key,
    require_same,
    require_single_channel,
    stack_channels,
    warn_unless_same,
)
from nnunetv2.imageio.faults import (
    DamagedFileError,
    Fault,
    find_damage,
    find_faults_in_nifti,
    find_form_faults,
    require_complete,
)
from nnunetv2.utilities.atomic_write import replacing

if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)

# bytes
_GIPL_HEADER = 256
_NIFTI_HEADER = 352


_LAYERS_REMEDY = (
    "If it holds overlapping segments in layers (.seg.nrrd of 3D Slicer), export them as one label map; "
    "for structures that overlap, train on regions (documentation/regions.md)"
)


class SeveralComponentsError(RuntimeError):
    """An image has several values per voxel."""

    def __init__(self, file: str, number: int) -> None:
        super().__init__(
            f"{file} has {number} values per voxel (a colour or vector image). Store each component as a "
            "channel in a file of its own: CASE_0000, CASE_0001, ..."
        )
        self.number = number


class SimpleITKIO(BaseReaderWriter):
    """2D, 3D and 4D images (first axis: channels) as they lie in the file."""

    supported_file_endings = [".nii.gz", ".nrrd", ".mha", ".gipl"]

    def read_images(self, image_fnames: Sequence[FilePath]) -> tuple[np.ndarray, dict]:
        """Read the channels of a case.

        `sitk_stuff` in the properties is the first file's geometry in ITK's order.

        Raises:
            RuntimeError: A file cannot be read or is no 2D to 4D scalar image, or shapes or spacings differ. Different
                origins or directions give a warning.
        """
        files = list_files(image_fnames)
        return _assemble([_read(file) for file in files], files)

    def read_seg(self, seg_fname: FilePath) -> tuple[np.ndarray, dict]:
        """Read a label map as float32 `(1, z, y, x)`."""
        try:
            seg, properties = self.read_images((seg_fname,))
        except SeveralComponentsError as error:
            raise RuntimeError(
                f"{fspath(seg_fname)} has {error.number} values per voxel, but a label map must have "
                f"one. {_LAYERS_REMEDY}"
            ) from error
        require_single_channel(seg, seg_fname)
        return seg, properties

    def write_seg(self, seg: np.ndarray, output_fname: FilePath, properties: dict) -> None:
        """Write a label map `(z, y, x)`, compressed.

        2D properties make a 2D file, 4D ones a 3D file.

        Raises:
            AssertionError: `seg` does not have three axes.
        """
        self.require_properties(properties)
        _write(_to_image(seg, properties), output_fname)

    def require_properties(self, properties: Mapping[str, Any]) -> None:
        """Check that the geometry in ITK's order is there."""
        require_key(properties, "sitk_stuff", type(self).__name__)

    def find_faults(self, fname: FilePath, is_label: bool = False) -> list[Fault]:
        """Find damage, and in NIfTI files NaN and infinity, in whose place ITK puts 0."""
        file = fspath(fname)
        return [*find_faults_in_nifti(file), *find_form_faults(file)] if _is_nifti(file) else find_damage(file)


class SimpleITKIOWithReorient(SimpleITKIO):
    """SimpleITKIO with 3D images in one orientation.

    Label maps are brought back into theirs.
    """

    def read_images(self, image_fnames: Sequence[FilePath], orientation: str = "RAS") -> tuple[np.ndarray, dict]:
        """Read the channels of a case in an orientation given by an ITK code.

        `original_orientation` in `sitk_stuff` is the code of the first file. 2D images stay as they are.
        """
        files = list_files(image_fnames)
        images = [_read(file) for file in files]
        codes = [_orientation_code(image) for image in images]
        oriented = [image if code is None else _orient(image, orientation) for image, code in zip(images, codes)]
        data, properties = _assemble(oriented, files)
        if codes[0] is not None:
            properties["sitk_stuff"]["original_orientation"] = codes[0]
        return data, properties

    def write_seg(self, seg: np.ndarray, output_fname: FilePath, properties: dict) -> None:
        """Write a label map `(z, y, x)` in the orientation that the image had."""
        self.require_properties(properties)
        image = _to_image(seg, properties)
        code = properties["sitk_stuff"].get("original_orientation")
        _write(image if code is None else _orient(image, code), output_fname)


def _read(file: str) -> sitk.Image:
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(file)
    except RuntimeError as error:
        raise RuntimeError(_explain(error, file)) from error
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise SeveralComponentsError(file, image.GetNumberOfComponentsPerPixel())
    if image.GetDimension() not in (2, 3, 4):
        raise RuntimeError(f"{file} has {image.GetDimension()} dimensions; expected 2, 3 or 4")
    _require_complete(image, file)
    return image


def _explain(error: RuntimeError, file: str) -> str:
    """Explain an error of ITK, whose text begins with source lines."""
    text = " ".join(str(error).split())
    if "orthonormal" in text:
        return (
            f"{file} has axes that are not at right angles, or not of length 1 (shear or rounding in its header), "
            "which SimpleITK refuses. Resample the image to a straight grid; or if the header is meant, name "
            "NibabelIO in overwrite_image_reader_writer of dataset.json"
        )
    return (
        f"{file} cannot be read. It is empty, damaged, or of another format than its name says "
        f"({text.rpartition('ERROR: ')[2]})"
    )


def _require_complete(image: sitk.Image, file: str) -> None:
    """Check the size of files in formats for which ITK does not.

    It would fill up missing bytes.
    """
    if _is_nifti(file) and image.HasMetaDataKey("vox_offset"):
        # scaled types are larger in memory than in the file
        voxels = image.GetNumberOfPixels() * int(image.GetMetaData("bitpix")) // 8
        require_complete(file, int(float(image.GetMetaData("vox_offset"))) + voxels)
    elif file.lower().endswith(".gipl"):
        require_complete(file, _GIPL_HEADER + _num_bytes(image))


def _num_bytes(image: sitk.Image) -> int:
    return image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()


def _is_nifti(file: str) -> bool:
    return file.lower().endswith((".nii", ".nii.gz"))


def _assemble(images: Sequence[sitk.Image], files: Sequence[str]) -> tuple[np.ndarray, dict]:
    """Stack the images of a case and describe their geometry."""
    are_same = BaseReaderWriter._check_all_same
    data = stack_channels([_view(image) for image in images], files)
    for what in ("spacing", "origin", "direction"):
        values = [getattr(image, f"Get{what.capitalize()}")() for image in images]
        check = require_same if what == "spacing" else warn_unless_same
        # a 2D and a 3D file with one slice have the same shape, but geometries of different lengths
        check(lambda entries: len({len(entry) for entry in entries}) == 1 and are_same(entries), what, values, files)
    first = images[0]
    stuff = {"spacing": first.GetSpacing(), "origin": first.GetOrigin(), "direction": first.GetDirection()}
    return data, {"sitk_stuff": stuff, "spacing": _array_spacing(first.GetSpacing())}


def _view(image: sitk.Image) -> np.ndarray:
    """Return an image's voxels as `(c, z, y, x)`, without a copy."""
    import SimpleITK as sitk

    voxels = sitk.GetArrayViewFromImage(image)
    return {2: lambda: voxels[None, None], 3: lambda: voxels[None], 4: lambda: voxels}[voxels.ndim]()


def _array_spacing(itk_spacing: Sequence[float]) -> list[np.float64]:
    """Return the spacing of three array axes. In 2D the first axis is far coarser than the others."""
    spacing = np.abs(itk_spacing)[::-1]
    if len(spacing) == 2:
        return [np.max(spacing) * 999, *spacing]
    return list(spacing[-3:])


def _to_image(seg: np.ndarray, properties: dict) -> sitk.Image:
    import SimpleITK as sitk

    assert seg.ndim == 3, f"a label map to be written must have 3 axes, this one has shape {seg.shape}"
    stuff = properties["sitk_stuff"]
    dim_read = len(stuff["spacing"])
    dim = min(dim_read, 3)
    image = sitk.GetImageFromArray(as_labels(seg[0] if dim == 2 else seg))
    # a label map has no axis of channels: leave the fourth row and column out
    direction = np.reshape(stuff["direction"], (dim_read, dim_read))[:dim, :dim]
    image.SetSpacing(stuff["spacing"][:dim])
    image.SetOrigin(stuff["origin"][:dim])
    image.SetDirection(direction.ravel().tolist())
    return image


def _write(image: sitk.Image, output_fname: FilePath) -> None:
    import SimpleITK as sitk

    with replacing(output_fname) as file:
        sitk.WriteImage(image, str(file), True)
        _require_written(image, str(file), fspath(output_fname))


def _require_written(image: sitk.Image, file: str, output_fname: str) -> None:
    """Check the size of a written file where ITK does not.

    In these formats it does not notice even a full disk.
    """
    header = _NIFTI_HEADER if _is_nifti(file) else _GIPL_HEADER if file.lower().endswith(".gipl") else None
    if header is None:
        return
    try:
        require_complete(file, header + _num_bytes(image))
    except DamagedFileError as error:
        raise OSError(
            errno.ENOSPC,
            "only a part of the file could be written; is the disk full? Free some space, or write elsewhere",
            output_fname,
        ) from error


def _orientation_code(image: sitk.Image) -> str | None:
    """Return the three letters of an image's orientation; only 3D images have one."""
    import SimpleITK as sitk

    if image.GetDimension() != 3:
        return None
    return sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())


def _orient(image: sitk.Image, code: str) -> sitk.Image:
    import SimpleITK as sitk

    return sitk.DICOMOrient(image, code)
