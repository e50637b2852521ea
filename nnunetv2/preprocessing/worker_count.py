"""Choose how many processes work on cases.

As many as cores, cases and the machine's free memory allow.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from math import ceil, prod
from pathlib import Path

from nnunetv2.utilities.free_memory import free_memory_bytes

logger = logging.getLogger(__name__)

WORKER_BYTES = 160 * 2**20
"""A worker before it has read anything: Python and its libraries."""
_SHARE_OF_FREE_MEMORY = 0.8
# Users' functions, other resampling, and heaps that do not shrink.
_MARGIN = 1.25


def choose_num_processes(
    bytes_per_case: int, num_cases: int, *, free_bytes: int | None = None, cores: int | None = None
) -> int:
    """Return a number of worker processes, at least 1.

    Args:
        bytes_per_case: Memory of a process that works on the largest case, itself included.
        free_bytes, cores: Default: those of this machine (or container).
    """
    free_bytes = free_memory_bytes() if free_bytes is None else free_bytes
    cores = available_cores() if cores is None else cores
    by_memory = int(_SHARE_OF_FREE_MEMORY * free_bytes // bytes_per_case)
    chosen = max(1, min(cores, num_cases, by_memory))
    if by_memory < min(cores, num_cases):
        logger.info(
            "%d process(es), because a case may take %.1f GB and %.1f GB are free; -np decides otherwise",
            chosen,
            bytes_per_case / 1e9,
            free_bytes / 1e9,
        )
    return chosen


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the cores that this process may use.

    Those of the machine, as far as affinity or a container's quota allow.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no quota ("max"), or no cgroups
        return cores


def bytes_to_preprocess(
    fingerprint: dict, *, spacing: Sequence[float], transpose_forward: Sequence[int], num_channels: int
) -> int:
    """Estimate the memory of a process that preprocesses the case that takes most.

    Args:
        fingerprint: The content of dataset_fingerprint.json.
        spacing: Target spacing in the order of the transposed axes, two entries for 2d.
        transpose_forward: Order of the axes in preprocessed arrays.
    """
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    before_cropping = 1 / max(fingerprint["median_relative_size_after_cropping"], 0.1)
    largest = 0
    for shape, original in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"]):
        shape, original = ([values[axis] for axis in transpose_forward] for values in (shape, original))
        wanted = original[: len(original) - len(spacing)] + list(spacing)
        old, new = prod(shape), prod(map(int, compute_new_shape(shape, original, wanted)))
        largest = max(largest, case_bytes(old * before_cropping, old, new, num_channels))
    return WORKER_BYTES + largest


def case_bytes(read_voxels: float, cropped_voxels: int, resampled_voxels: int, channels: int) -> int:
    """Estimate the memory that the arrays of one case take at most.

    Two moments count: the float32 arrays as read beside their cropped copy, and the cropped arrays beside the
    resampled ones with the indices of their foreground.
    """
    reading = read_voxels * (4 * channels + 7) + cropped_voxels * (4 * channels + 2)
    resampling = cropped_voxels * (4 * channels + 2) + resampled_voxels * (4 * channels + 5)
    return int(_MARGIN * max(reading, resampling))


def bytes_to_read(cases: Iterable[Iterable[str]]) -> int:
    """Estimate the memory of a process that reads and crops the largest of some cases.

    Args:
        cases: Files per case, images and label.
    """
    largest = max(cases, key=lambda files: sum(map(_size, files)))
    return WORKER_BYTES + int(_MARGIN * 10 * sum(map(voxels_in_file, largest)))


def voxels_in_file(file: str) -> int:
    """Return the voxels of an image from its header.

    From its size where SimpleITK knows no such format.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return 10 * _size(file)  # compressed, probably
    return prod(reader.GetSize()) * reader.GetNumberOfComponents()


def _size(file: str) -> int:
    try:
        return Path(file).stat().st_size
    except OSError:  # reading the case will tell
        return 0
