"""Average the probabilities of several models, one class at a time.

Memory holds that class of each model only.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

KEY = "probabilities"


def average_classes(files: Sequence[str]) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """Return the files' common shape `(c, *spatial)`, and the mean of each class.

    A mean is a float32 array `(*spatial)`.

    The iterator may be left early; files are open only while it runs.

    Raises:
        ValueError: A file holds no probabilities, or their shapes differ.
    """
    shapes = [_read_shape(file) for file in files]
    for file, shape in zip(files, shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"{file} has probabilities of shape {shape}, {files[0]} of shape {shapes[0]}: models of "
                "one ensemble must predict the same classes of the same images"
            )
    return shapes[0], _average(files)


def _average(files: Sequence[str]) -> Iterator[np.ndarray]:
    with ExitStack() as stack:
        for first, *others in zip(*(_read_classes(file, stack) for file in files)):
            total = first.astype(np.float32)
            for other in others:
                total += other
            total /= len(files)
            yield total


def _read_shape(file: str) -> tuple[int, ...]:
    with ExitStack() as stack:
        stream = _open(file, stack)
        return _read_header(stream, file)[0]


def _read_classes(file: str, stack: ExitStack) -> Iterator[np.ndarray]:
    """Yield the arrays `(*spatial)` of all classes; the file stays open until `stack` closes."""
    stream = _open(file, stack)
    shape, is_fortran, dtype = _read_header(stream, file)
    if is_fortran:  # classes alternate from number to number
        whole = np.frombuffer(_read_exactly(stream, int(np.prod(shape)) * dtype.itemsize, file), dtype)
        yield from whole.reshape(shape, order="F")
        return
    count = int(np.prod(shape[1:]))
    for _ in range(shape[0]):
        yield np.frombuffer(_read_exactly(stream, count * dtype.itemsize, file), dtype).reshape(shape[1:])


def _open(file: str, stack: ExitStack) -> Any:
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no {file}; predict with --save_probabilities (train with --npz)")
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        return stack.enter_context(archive.open(f"{KEY}.npy"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{file} holds no array named {KEY}, or is damaged: {error}") from error


def _read_header(stream: zipfile.ZipExtFile, file: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    shape, is_fortran, dtype = read[version](stream)
    if dtype.kind != "f" or len(shape) < 2:
        raise ValueError(
            f"{file}: {KEY} must be floating point numbers (classes, x, y, z), they are {dtype} of shape {shape}"
        )
    return shape, is_fortran, dtype


def _read_exactly(stream: zipfile.ZipExtFile, size: int, file: str) -> bytearray:
    content = bytearray(size)
    filled, view = 0, memoryview(content)
    while filled < size:
        count = stream.readinto(view[filled:])
        if not count:
            raise ValueError(f"{file} ends early: {filled} of {size} bytes of a class")
        filled += count
    return content
