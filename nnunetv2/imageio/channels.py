"""Share the steps of all readers and writers.

Take files, compare channels, stack them, choose the type of a label map.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.imageio.base_reader_writer import FilePath

logger = logging.getLogger(__name__)


def list_files(image_fnames: Sequence[FilePath]) -> list[str]:
    """Return the files of a case as text.

    Raises:
        TypeError: A single file was given instead of a list.
        ValueError: There is no file.
        FileNotFoundError: A file does not exist.
    """
    if isinstance(image_fnames, (str, os.PathLike)):
        raise TypeError(f"read_images takes a list of files, one per channel, but was given {image_fnames!r}")
    files = [os.fspath(file) for file in image_fnames]
    if not files:
        raise ValueError("read_images was given an empty list of files")
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(describe_missing(file))
    return files


def describe_missing(file: FilePath) -> str:
    """Describe a missing image file, or a link to a missing one."""
    if Path(file).is_symlink():
        return (
            f"image file {os.fspath(file)} is a link to {Path(file).readlink()}, which does not exist. Is the disk "
            "mounted that it is on?"
        )
    return f"image file {os.fspath(file)} does not exist"


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Let errors of a library that reads a file name the file.

    Raises:
        RuntimeError: The library raised an error, which is the cause.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # each library has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(
            f"{file} cannot be read. It is damaged, or of another format than its name says ({reason})"
        ) from error


def stack_channels(images: Sequence[np.ndarray], files: Sequence[str]) -> np.ndarray:
    """Stack arrays `(c_i, x, y, z)` of several files into one float32 array.

    Raises:
        RuntimeError: Their spatial shapes differ.
    """
    require_same(lambda shapes: len(set(shapes)) == 1, "shape", [image.shape[1:] for image in images], files)
    return np.concatenate(images, axis=0, dtype=np.float32, casting="unsafe")


def require_same(are_same: Callable[[Sequence], bool], what: str, values: Sequence, files: Sequence[str]) -> None:
    """Check that the files of a case agree in a property.

    Raises:
        RuntimeError: They do not. The message lists each file with its value.
    """
    if not are_same(values):
        raise RuntimeError(f"the images of one case differ in {what}: {_describe(values, files)}")


def warn_unless_same(are_same: Callable[[Sequence], bool], what: str, values: Sequence, files: Sequence[str]) -> None:
    """Log a warning if the files of a case disagree in a property."""
    if not are_same(values):
        logger.warning(
            "the images of one case differ in %s, the first one's is used. If they are not aligned, the "
            "network will learn nonsense: %s",
            what,
            _describe(values, files),
        )


def require_key(properties: Mapping[str, Any], key: str, reader: str) -> None:
    """Check that the properties of an image hold the geometry that a reader notes.

    Raises:
        ValueError: They do not.
    """
    if key not in properties:
        raise ValueError(
            f"these properties were not made by {reader}: they lack {key!r} and have "
            f"{', '.join(map(repr, properties)) or 'nothing'}. Read the image with {reader}, the model's "
            "reader, or ask for the label map as an array (no output file) and write it yourself"
        )


def as_labels(seg: np.ndarray) -> np.ndarray:
    """Return a label map as it is written: uint8 below 255, else uint16."""
    return seg.astype(np.uint8 if np.max(seg) < 255 else np.uint16, copy=False)


def require_single_channel(seg: np.ndarray, file: FilePath) -> None:
    """Check that a label map was read as `(1, x, y, z)`.

    Raises:
        RuntimeError: The file has several channels.
    """
    if seg.shape[0] != 1:
        raise RuntimeError(
            f"{os.fspath(file)} has {seg.shape[0]} channels; a label map must have one, with the label "
            "of each voxel as its value (gray, not in colours)"
        )


def _describe(values: Sequence, files: Sequence[str]) -> str:
    return "; ".join(
        f"{file} has {np.array2string(np.asarray(value), separator=', ')}" for file, value in zip(files, values)
    )
