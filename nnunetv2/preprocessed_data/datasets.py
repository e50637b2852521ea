"""Store preprocessed cases and read them back.

An image, its labels and its properties per case.

Two formats exist: Blosc2 (`case.b2nd`, `case_seg.b2nd`), compressed in chunks so that a patch can be read alone, and
NumPy (`case.npz`, unpacked to `case.npy` and `case_seg.npy` for training). Properties are in `case.pkl` in both.
"""

from __future__ import annotations

import logging
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nnunetv2.configuration import default_num_processes
from nnunetv2.errors import InvalidInputError
from nnunetv2.preprocessed_data.blosc2_layout import choose_filter, comp_blosc2_params, compression
from nnunetv2.utilities.atomic_write import replacing
from nnunetv2.utilities.restricted_pickle import load_pickle_safely, save_pickle

if TYPE_CHECKING:
    import blosc2

    from nnunetv2.preprocessed_data.array_cache import ArrayCache
    from nnunetv2.preprocessed_data.properties_cache import PropertiesCache

__all__ = [
    "comp_blosc2_params",
    "file_ending_dataset_mapping",
    "infer_dataset_class",
    "nnUNetBaseDataset",
    "nnUNetDatasetBlosc2",
    "nnUNetDatasetNumpy",
]

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Array: TypeAlias = "np.ndarray | blosc2.NDArray"
    Case = tuple[Array, Array, Array | None, dict]


class nnUNetBaseDataset(ABC):
    """The cases of one folder. Opens no file before a case is asked for.

    Args:
        folder: Holds the preprocessed cases.
        identifiers: Names of cases; sorted in place. Default: all in the folder.
        folder_with_segs_from_previous_stage: Holds a segmentation per case, for the second stage of a cascade.
    """

    properties_cache: PropertiesCache | None = None
    array_cache: ArrayCache | None = None
    """Both are set by data loaders, which ask for the same cases again and again."""

    def __init__(
        self, folder: str, identifiers: list[str] | None = None, folder_with_segs_from_previous_stage: str | None = None
    ):
        self.source_folder = folder
        self.folder_with_segs_from_previous_stage = folder_with_segs_from_previous_stage
        self.identifiers = self.get_identifiers(folder) if identifiers is None else identifiers
        self.identifiers.sort()

    def __getitem__(self, identifier: str) -> Case:
        return self.load_case(identifier)

    @abstractmethod
    def load_case(self, identifier: str) -> Case:
        """Return image, labels, labels of the previous stage or None, and properties.

        Arrays are `(c, x, y, z)` and `(1, x, y, z)`.

        Arrays are opened, not read: index them to get values.
        """

    # Training, validation and cascades need the three abstract methods; a format of a user may leave out the others.

    @staticmethod
    def save_case(data: np.ndarray, seg: np.ndarray, properties: dict, output_filename_truncated: str) -> None:
        """Write a case to files that start with `output_filename_truncated`; needed to preprocess into the format."""
        raise NotImplementedError("this dataset class cannot write cases")

    @staticmethod
    @abstractmethod
    def save_seg(seg: np.ndarray, output_filename_truncated: str) -> None:
        """Write labels `(x, y, z)` on their own, for the next stage of a cascade."""

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Return the sorted names of all cases in a folder.

        Needed where no identifiers are given.
        """
        raise NotImplementedError("this dataset class cannot list the cases of a folder")

    @staticmethod
    @abstractmethod
    def unpack_dataset(
        folder: str, overwrite_existing: bool = False, num_processes: int = default_num_processes, verify: bool = True
    ) -> None:
        """Prepare the files for fast reading of patches, where the format needs it."""

    def _load_properties(self, identifier: str) -> dict:
        path = _existing(Path(self.source_folder) / f"{identifier}.pkl", identifier)
        return load_pickle_safely(path) if self.properties_cache is None else self.properties_cache.load(path)


class nnUNetDatasetBlosc2(nnUNetBaseDataset):
    """Cases as compressed arrays of which parts can be read."""

    def __init__(
        self, folder: str, identifiers: list[str] | None = None, folder_with_segs_from_previous_stage: str | None = None
    ):
        super().__init__(folder, identifiers, folder_with_segs_from_previous_stage)
        import blosc2

        blosc2.set_nthreads(1)  # one process per CPU reads already

    def load_case(self, identifier: str) -> Case:
        """See the base class. The arrays are `blosc2.NDArray`."""
        folder = Path(self.source_folder)
        data = self._open(folder / f"{identifier}.b2nd", identifier)
        seg = self._open(folder / f"{identifier}_seg.b2nd", identifier)
        seg_prev = None
        if self.folder_with_segs_from_previous_stage is not None:
            seg_prev = self._open(Path(self.folder_with_segs_from_previous_stage) / f"{identifier}.b2nd", identifier)
        return data, seg, seg_prev, self._load_properties(identifier)

    def _open(self, path: Path, identifier: str) -> blosc2.NDArray:
        if self.array_cache is None:
            return _open_blosc2(path, identifier)
        return self.array_cache.get(path, partial(_open_blosc2, identifier=identifier))

    @staticmethod
    def _select_filter(
        arr: np.ndarray, blocks: Sequence[int], chunks: Sequence[int], codec: blosc2.Codec, clevel: int
    ) -> blosc2.Filter:
        """Return the filter that compresses a chunk from the middle best; after any trouble, none."""
        import blosc2

        try:
            return choose_filter(arr, blocks, chunks, codec, clevel)
        except Exception as error:  # noqa: BLE001  whatever it is, the file can be written without a filter
            logger.warning("cannot try filters on an array of shape %s, so it is stored without: %s", arr.shape, error)
            return blosc2.Filter.NOFILTER

    @staticmethod
    def save_case(
        data: np.ndarray,
        seg: np.ndarray,
        properties: dict,
        output_filename_truncated: str,
        chunks: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
        chunks_seg: Sequence[int] | None = None,
        blocks_seg: Sequence[int] | None = None,
        clevel: int = 5,
        codec: blosc2.Codec | None = None,
        filters: blosc2.Filter | Sequence[blosc2.Filter] | None = None,
        filters_seg: blosc2.Filter | Sequence[blosc2.Filter] | None = None,
    ) -> None:
        """Write a case.

        The image comes last: only files with an image count as a case, so every case is complete.

        Args:
            chunks, blocks: Shapes `(1, x, y, z)`. Default: for patches of 128 voxels a side, with a warning.
            chunks_seg, blocks_seg: Default: those of the image.
            codec: Default: LZ4HC.
            filters, filters_seg: Default: SHUFFLE or none, whichever compresses better.

        Raises:
            RuntimeError: The case exists already.
        """
        import blosc2

        codec = blosc2.Codec.LZ4HC if codec is None else codec
        if chunks is None or blocks is None:
            logger.warning(
                "%s: no chunk and block shapes were given; taking those for patches of 128 voxels a side",
                output_filename_truncated,
            )
            default_blocks, default_chunks = comp_blosc2_params(data.shape, (128, 128, 128), data.itemsize)
            chunks, blocks = chunks or default_chunks, blocks or default_blocks
        image_file, seg_file, properties_file = (
            Path(f"{output_filename_truncated}{ending}") for ending in (".b2nd", "_seg.b2nd", ".pkl")
        )
        for path in (image_file, seg_file):
            if path.exists():
                raise RuntimeError(f"{path} exists already; remove it to write the case anew")
        write = nnUNetDatasetBlosc2._write_array
        try:
            write(seg_file, seg, chunks_seg or chunks, blocks_seg or blocks, codec, clevel, filters_seg)
            save_pickle(properties, properties_file)
            write(image_file, data, chunks, blocks, codec, clevel, filters)
        except BaseException:  # also Ctrl-C: no half of a case may stay
            for path in (image_file, properties_file, seg_file):
                path.unlink(missing_ok=True)
            raise

    @staticmethod
    def _write_array(
        path: Path,
        array: np.ndarray,
        chunks: Sequence[int],
        blocks: Sequence[int],
        codec: blosc2.Codec,
        clevel: int,
        filters: blosc2.Filter | Sequence[blosc2.Filter] | None,
    ) -> None:
        import blosc2

        array = np.ascontiguousarray(array)
        chunks = tuple(min(n, c) for n, c in zip(array.shape, chunks))
        blocks = tuple(min(n, b) for n, b in zip(chunks, blocks))
        if filters is None:
            filters = nnUNetDatasetBlosc2._select_filter(array, blocks, chunks, codec, clevel)
        with replacing(path) as written, _explaining_failure_to_write(path):
            blosc2.asarray(
                array, urlpath=str(written), chunks=chunks, blocks=blocks, cparams=compression(codec, clevel, filters)
            )

    @staticmethod
    def save_seg(
        seg: np.ndarray,
        output_filename_truncated: str,
        chunks_seg: Sequence[int] | None = None,
        blocks_seg: Sequence[int] | None = None,
    ) -> None:
        """Write labels `(x, y, z)` to `{output_filename_truncated}.b2nd`, in the place of an older file."""
        import blosc2

        path = Path(f"{output_filename_truncated}.b2nd")
        with replacing(path) as written, _explaining_failure_to_write(path):
            blosc2.asarray(np.ascontiguousarray(seg), urlpath=str(written), chunks=chunks_seg, blocks=blocks_seg)

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Return the sorted names of all cases in a folder."""
        ending = ".b2nd"
        return [
            name[: -len(ending)]
            for name in _file_names(folder)
            if name.endswith(ending) and not name.endswith("_seg.b2nd")
        ]

    @staticmethod
    def unpack_dataset(
        folder: str, overwrite_existing: bool = False, num_processes: int = default_num_processes, verify: bool = True
    ) -> None:
        """Do nothing: parts of these files can be read as they are."""


class nnUNetDatasetNumpy(nnUNetBaseDataset):
    """Cases as NumPy archives, unpacked to plain arrays where reading has to be fast."""

    def load_case(self, identifier: str) -> Case:
        """See the base class. Memory maps where the case was unpacked, else arrays."""
        folder = Path(self.source_folder)
        data = _load_unpacked_or_packed(folder / f"{identifier}.npy", folder / f"{identifier}.npz", "data", identifier)
        seg = _load_unpacked_or_packed(
            folder / f"{identifier}_seg.npy", folder / f"{identifier}.npz", "seg", identifier
        )
        seg_prev = None
        if self.folder_with_segs_from_previous_stage is not None:
            previous = Path(self.folder_with_segs_from_previous_stage)
            seg_prev = _load_unpacked_or_packed(
                previous / f"{identifier}.npy", previous / f"{identifier}.npz", "seg", identifier
            )
        return data, seg, seg_prev, self._load_properties(identifier)

    @staticmethod
    def save_case(data: np.ndarray, seg: np.ndarray, properties: dict, output_filename_truncated: str) -> None:
        """Write the properties of a case, then its `.npz` with the keys `data` and `seg`."""
        save_pickle(properties, f"{output_filename_truncated}.pkl")
        with replacing(f"{output_filename_truncated}.npz") as written:
            np.savez_compressed(written, data=data, seg=seg)

    @staticmethod
    def save_seg(seg: np.ndarray, output_filename_truncated: str) -> None:
        """Write labels `(x, y, z)` as `.npz` with the key `seg`."""
        with replacing(f"{output_filename_truncated}.npz") as written:
            np.savez_compressed(written, seg=seg)

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Return the sorted names of all cases in a folder."""
        return [name[: -len(".npz")] for name in _file_names(folder) if name.endswith(".npz")]

    @staticmethod
    def unpack_dataset(
        folder: str, overwrite_existing: bool = False, num_processes: int = default_num_processes, verify: bool = True
    ) -> None:
        """Unpack each `.npz` to `.npy` and `_seg.npy`, which can be memory-mapped."""
        from nnunetv2.preprocessed_data.unpacking import unpack_dataset

        unpack_dataset(folder, True, overwrite_existing, num_processes, verify)


@contextmanager
def _explaining_failure_to_write(path: Path) -> Iterator[None]:
    """Say of which file blosc2 tells no more than that it could not be created."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            f"{path} could not be written ({error}). The disk is probably full: free some space, or let "
            "nnUNet_preprocessed name another folder"
        ) from error


file_ending_dataset_mapping: dict[str, type[nnUNetBaseDataset]] = {
    "npz": nnUNetDatasetNumpy,
    "b2nd": nnUNetDatasetBlosc2,
}


def infer_dataset_class(folder: str) -> type[nnUNetBaseDataset]:
    """Return the class for the format of the cases in a folder.

    Files of other kinds do not matter.

    Raises:
        InvalidInputError: There is no case, or cases are stored in more than one format.
    """
    names = _file_names(folder)
    found = [ending for ending in file_ending_dataset_mapping if any(name.endswith(f".{ending}") for name in names)]
    if len(found) == 1:
        return file_ending_dataset_mapping[found[0]]
    formats = " or ".join(f".{ending}" for ending in file_ending_dataset_mapping)
    if not found:
        raise InvalidInputError(
            f"{folder} holds no preprocessed case ({formats}) among its {len(names)} files; "
            "run nnUNetv2_preprocess for this configuration"
        )
    raise InvalidInputError(
        f"{folder} holds cases in several formats ({' and '.join(found)}), so it is unclear which "
        "to use; remove one, or run nnUNetv2_preprocess again"
    )


def _file_names(folder: str) -> list[str]:
    """Return the sorted names of the visible files.

    Hidden folders `.partial-*` hold files that are being written.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; run nnUNetv2_preprocess for this configuration")
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())


def _existing(path: Path, identifier: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"case {identifier}: {path} is missing; if its preprocessing was interrupted, run nnUNetv2_preprocess again"
        )
    return path


def _open_blosc2(path: Path, identifier: str) -> blosc2.NDArray:
    import blosc2

    # On Windows a memory-mapped file cannot be replaced or removed while it is open.
    mmap_mode = None if platform.system() == "Windows" else "r"
    return blosc2.open(urlpath=str(_existing(path, identifier)), mode="r", dparams={"nthreads": 1}, mmap_mode=mmap_mode)


def _load_unpacked_or_packed(unpacked: Path, packed: Path, key: str, identifier: str) -> np.ndarray:
    if unpacked.is_file():
        return np.load(unpacked, mmap_mode="r")
    with np.load(_existing(packed, identifier)) as archive:
        return archive[key]
