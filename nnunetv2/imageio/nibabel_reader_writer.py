"""Read and write 3D NIfTI files with nibabel.

As they lie in the file, or in the nearest RAS+ orientation.

NIfTI arrays are (x, y, z); ours are their transpose (z, y, x), as with SimpleITK.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter, FilePath
from nnunetv2.imageio.channels import (
    as_labels,
    list_files,
    naming,
    require_key,
    require_same,
    stack_channels,
    warn_unless_same,
)
from nnunetv2.imageio.faults import Fault, find_damage, find_form_faults
from nnunetv2.utilities.atomic_write import replacing

if TYPE_CHECKING:
    import nibabel

logger = logging.getLogger(__name__)


class NibabelIO(BaseReaderWriter):
    """NIfTI as it lies in the file."""

    supported_file_endings = [".nii", ".nii.gz"]

    def read_images(self, image_fnames: Sequence[FilePath]) -> tuple[np.ndarray, dict]:
        """Read the channels of a case. The first file's affine is kept in `nibabel_stuff`.

        Raises:
            AssertionError: An image does not have three axes.
            RuntimeError: Shapes or spacings differ. Different affines give a warning.
        """
        files = list_files(image_fnames)
        images = [_load(file) for file in files]
        affines = [image.affine for image in images]
        warn_unless_same(self._check_all_same_array, "affine", affines, files)
        return _stack(images, files), {"nibabel_stuff": {"original_affine": affines[0]}, "spacing": _spacing(images[0])}

    def read_seg(self, seg_fname: FilePath) -> tuple[np.ndarray, dict]:
        """Read a label map as float32 `(1, z, y, x)`."""
        return self.read_images((seg_fname,))

    def write_seg(self, seg: np.ndarray, output_fname: FilePath, properties: dict) -> None:
        """Write a label map `(z, y, x)` with the affine of the image."""
        self.require_properties(properties)
        _save(_to_image(seg, properties["nibabel_stuff"]["original_affine"]), output_fname)

    def require_properties(self, properties: Mapping[str, Any]) -> None:
        """Check that the affine of the image is there."""
        require_key(properties, "nibabel_stuff", type(self).__name__)

    def find_faults(self, fname: FilePath, is_label: bool = False) -> list[Fault]:
        """Find damage, since nibabel does not look at checksums."""
        return [*find_damage(fspath(fname)), *find_form_faults(fspath(fname))]


class NibabelIOWithReorient(NibabelIO):
    """NIfTI with axes flipped and permuted towards RAS+.

    Label maps go back into the orientation of their image.
    """

    def read_images(self, image_fnames: Sequence[FilePath]) -> tuple[np.ndarray, dict]:
        """Read the channels of a case.

        The first file's affines before and after are kept in `nibabel_stuff`.

        Raises:
            AssertionError: An image does not have three axes.
            RuntimeError: Shapes or spacings differ after reorientation. Different affines give a warning.
        """
        files = list_files(image_fnames)
        originals = [_load(file) for file in files]
        images = [_reorient(image, file) for image, file in zip(originals, files)]
        affines = [image.affine for image in images]
        warn_unless_same(self._check_all_same_array, "reoriented affine", affines, files)
        stuff = {"original_affine": originals[0].affine, "reoriented_affine": affines[0]}
        return _stack(images, files), {"nibabel_stuff": stuff, "spacing": _spacing(images[0])}

    def write_seg(self, seg: np.ndarray, output_fname: FilePath, properties: dict) -> None:
        """Write a label map `(z, y, x)` in the orientation that the image had."""
        from nibabel.orientations import io_orientation, ornt_transform

        self.require_properties(properties)
        stuff = properties["nibabel_stuff"]
        image = _to_image(seg, stuff["reoriented_affine"])
        way_back = ornt_transform(io_orientation(image.affine), io_orientation(stuff["original_affine"]))
        restored = image.as_reoriented(way_back)
        if not np.allclose(restored.affine, stuff["original_affine"]):
            logger.warning(
                "%s is written with affine %s, because reorientation did not restore the image's, %s",
                fspath(output_fname),
                restored.affine.tolist(),
                stuff["original_affine"].tolist(),
            )
        _save(restored, output_fname)


def _load(file: str) -> nibabel.Nifti1Image:
    import nibabel

    with naming(file):
        image: Any = nibabel.load(file)
    assert image.ndim == 3, (
        f"{file} has {image.ndim} dimensions, shape {image.shape}; the nibabel readers take 3D images only. Store "
        "each channel in a 3D file of its own; 2D images are read by SimpleITKIO"
    )
    if image.get_data_dtype().fields is not None:
        raise RuntimeError(
            f"{file} holds colours ({image.get_data_dtype()}). Store each as a channel in a file of its "
            "own: CASE_0000, CASE_0001, ..."
        )
    return image


def _reorient(image: nibabel.Nifti1Image, file: str) -> nibabel.Nifti1Image:
    """Flip and permute axes towards RAS+, which reads the voxels."""
    from nibabel.orientations import io_orientation

    with naming(file):
        return image.as_reoriented(io_orientation(image.affine))


def _stack(images: Sequence[nibabel.Nifti1Image], files: Sequence[str]) -> np.ndarray:
    data = stack_channels([_voxels(image, file) for image, file in zip(images, files)], files)
    require_same(BaseReaderWriter._check_all_same, "spacing", [_spacing(image) for image in images], files)
    return data


def _voxels(image: nibabel.Nifti1Image, file: str) -> np.ndarray:
    """Return `(1, z, y, x)`, scaled like get_fdata(), without its detour through float64 where nothing is scaled."""
    with naming(file):
        return np.asarray(image.dataobj).transpose(2, 1, 0)[None]


def _spacing(image: nibabel.Nifti1Image) -> list[float]:
    return [float(zoom) for zoom in image.header.get_zooms()[::-1]]


def _to_image(seg: np.ndarray, affine: np.ndarray) -> nibabel.Nifti1Image:
    import nibabel

    assert seg.ndim == 3, f"a label map to be written must have 3 axes, this one has shape {seg.shape}"
    return nibabel.Nifti1Image(as_labels(seg).transpose(2, 1, 0), affine=affine)


def _save(image: nibabel.Nifti1Image, output_fname: FilePath) -> None:
    import nibabel

    with replacing(output_fname) as file:
        nibabel.save(image, file)
