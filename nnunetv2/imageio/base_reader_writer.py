"""The interface of image readers and writers: files <-> arrays and their geometry.

Images are `(c, x, y, z)` arrays, where x is the first spatial axis of the array, whatever it is in the patient; spacing
is listed in the same order. A 2D image is `(c, 1, x, y)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from nnunetv2.imageio.faults import Fault

FilePath = str | PathLike[str]


class BaseReaderWriter(ABC):
    """Read images and label maps, and write label maps.

    To support a format of your own, put a module with a subclass into nnunetv2/imageio and name the class in
    `overwrite_image_reader_writer` of dataset.json.
    """

    supported_file_endings: Sequence[str] = []
    """Endings in lower case, with dot."""

    @abstractmethod
    def read_images(self, image_fnames: Sequence[FilePath]) -> tuple[np.ndarray, dict]:
        """Read the channels of a case, one file each, in the order of the files.

        Returns:
            A float32 array `(c, x, y, z)`, and properties with whatever `write_seg` needs and at least `spacing`: three
            numbers in array order. For 2D images the first of them must exceed the others.
        """

    @abstractmethod
    def read_seg(self, seg_fname: FilePath) -> tuple[np.ndarray, dict]:
        """Read a label map `(1, x, y, z)`, and its properties as for images."""

    @abstractmethod
    def write_seg(self, seg: np.ndarray, output_fname: FilePath, properties: dict) -> None:
        """Write a label map `(x, y, z)` with the properties of its image."""

    def require_properties(self, properties: Mapping[str, Any]) -> None:  # noqa: B027 (most formats need none)
        """Check early that `write_seg` can use the properties of an image.

        Raises:
            ValueError: Another reader made them.
        """

    def find_faults(self, fname: FilePath, is_label: bool = False) -> list[Fault]:
        """Find the faults of a file that can still be read.

        The integrity check calls this; it may take time.
        """
        return []

    def list_side_cars(self, fname: FilePath, is_label: bool = False) -> list[str]:
        """Return the files that belong to an image, whether they exist or not.

        Their stem is that of the case.
        """
        return []

    @staticmethod
    def _check_all_same(input_list: Sequence) -> bool:
        """Tell whether all entries (numbers or sequences of numbers) are numerically close to the first."""
        return len(input_list) == 1 or np.allclose(input_list[0], input_list[1:])

    @staticmethod
    def _check_all_same_array(input_list: Sequence[np.ndarray]) -> bool:
        """Tell whether all arrays have the shape of the first and are numerically close to it."""
        first, *others = input_list
        return all(other.shape == first.shape and np.allclose(first, other) for other in others)
