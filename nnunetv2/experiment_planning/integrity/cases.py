"""Find errors in a case's voxels, geometry and label values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.experiment_planning.integrity.files import relative
from nnunetv2.experiment_planning.integrity.findings import Finding, enumerate_some
from nnunetv2.experiment_planning.integrity.geometry import Geometry, find_displacement, get_geometry
from nnunetv2.experiment_planning.integrity.likeness import digest_voxels
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.faults import DAMAGED, Fault, describe_non_finite

_SHAPE_REMEDY = (
    "resample the file onto the first image of its case, or replace it by the right one; all files of a "
    "case must have the same voxels"
)
_SPACING_REMEDY = (
    "find out which spacing is right, and write it into the other file; do not resample unless the "
    "volumes really differ"
)
_PLACE_REMEDY = (
    "overlay both in a viewer. If they fit voxel by voxel, copy the header of the image into the other "
    "file; if they fit in space, resample the other file onto the image"
)


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case to check."""

    case: str
    images: Sequence[str]
    label: str
    folder: Path
    """The dataset's, to which reported files are relative."""


@dataclass(frozen=True)
class Expectation:
    """The claims of dataset.json about every case."""

    reader: type
    channels: Sequence[str]
    labels: Sequence[int] | None
    """With the ignore label, which comes last. None admits all values."""
    ignore: int | None = None


@dataclass
class CaseReport:
    """The findings in one case."""

    findings: list[Finding] = field(default_factory=list)
    labels: frozenset[int] = frozenset()
    """The expected labels that occur."""
    digests: dict[str, str] = field(default_factory=dict)
    """File -> digest of its voxels, of sound images that have more than one value."""


@dataclass(frozen=True)
class _Volume:
    """The properties compared between the files of a case.

    The shape is that of the voxels, without channels.
    """

    file: str
    num_channels: int
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    geometry: Geometry | None
    is_series: bool
    faults: list[Fault]


def inspect_case(files: CaseFiles, expected: Expectation) -> CaseReport:
    """Read one case, file by file, and report on it. Errors of readers become findings."""
    report = CaseReport()
    reader = expected.reader()
    groups = _group_files(files.images, expected.reader)
    volumes = [volume for group in groups if (volume := _inspect_images(reader, group, files, report)) is not None]
    if len(volumes) == len(groups):
        _add(report, files, volumes[0].file, find_channel_faults(volumes, expected.channels))
    label = _inspect_label(reader, files, expected, report)
    for other in [*volumes[1:], *([label] if label is not None else [])]:
        if volumes:
            _compare(report, files, volumes[0], other)
    return report


def _group_files(images: Sequence[str], reader: type) -> list[list[str]]:
    """Return the images to be read at once: one, so that a finding names it; all of them for readers of users."""
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    return [[image] for image in images] if reader in LIST_OF_IO_CLASSES else [list(images)]


def _inspect_images(reader: BaseReaderWriter, paths: list[str], files: CaseFiles, report: CaseReport) -> _Volume | None:
    """Report the faults of images on their own; return properties to compare."""
    faults, content = _read(reader, paths)
    faults = _report_doubts(report, files, paths[0], faults)
    volume = None
    if content is not None:
        image, properties = content
        volume = _describe(paths[0], image, properties)
        faults += [*volume.faults, *(find_intensity_faults(image) if not faults else [])]
        digest = digest_voxels(image) if not faults else None
        if digest is not None:
            report.digests[relative(paths[0], files.folder)] = digest
        elif not faults:
            _add(
                report,
                files,
                paths[0],
                [
                    Fault(
                        "the image has one value everywhere",
                        f"{image.flat[0]:g}",
                        "",
                        "look at the image; leave the case out if it shows nothing",
                    )
                ],
                is_error=False,
            )
    _add(report, files, paths[0], faults)
    return volume


def _inspect_label(
    reader: BaseReaderWriter, files: CaseFiles, expected: Expectation, report: CaseReport
) -> _Volume | None:
    """Report the label's faults, note its values; return properties to compare."""
    faults, content = _read(reader, [files.label], is_label=True)
    faults = _report_doubts(report, files, files.label, faults)
    volume = None
    if content is not None:
        label, properties = content
        volume = _describe(files.label, label, properties)
        of_values, report.labels = find_label_faults(label, expected.labels)
        # NaN may have been found already, in the file
        faults += [*volume.faults, *(fault for fault in of_values if fault not in faults)]
        if not faults and not report.labels - {0, expected.ignore}:
            _add(
                report,
                files,
                files.label,
                [
                    Fault(
                        "the label is background only",
                        "",
                        "",
                        "look at the case; some without foreground are fine if that is how it is",
                    )
                ],
                is_error=False,
            )
    _add(report, files, files.label, faults)
    return volume


def _read(
    reader: BaseReaderWriter, paths: list[str], is_label: bool = False
) -> tuple[list[Fault], tuple[np.ndarray, Mapping[str, Any]] | None]:
    """Read files. Return faults that reading does not show, or why it fails, and array and properties."""
    find_more: Any = getattr(reader, "find_faults", lambda path, is_label: [])  # readers need not be our subclasses
    faults = [fault for path in paths for fault in find_more(path, is_label)]
    if any(fault.what == DAMAGED for fault in faults):
        return faults, None
    try:
        return faults, reader.read_seg(paths[0]) if is_label else reader.read_images(paths)
    except Exception as error:  # noqa: BLE001  readers raise whatever their library raises; all of it belongs in the table
        unreadable = Fault(
            "a file cannot be read",
            _in_words(error),
            "",
            "open the file in a viewer; replace it if it is damaged, convert it if it is of another kind",
        )
        return [*faults, unreadable], None


def _describe(file: str, array: np.ndarray, properties: Mapping[str, Any]) -> _Volume:
    spacing = tuple(float(entry) for entry in properties["spacing"])
    faults = []
    if not array.size:
        faults.append(Fault("a file has no voxels", _by(array.shape[1:]), "", "replace it, or leave the case out"))
    if len(spacing) != 3 or not np.isfinite(spacing).all() or min(spacing) <= 0:
        faults.append(
            Fault(
                "the spacing makes no sense",
                enumerate_some(spacing),
                "three numbers above 0",
                "write the size of a voxel in mm into the header of the file",
            )
        )
    is_series = len(properties.get("sitk_stuff", {}).get("spacing", ())) == 4
    return _Volume(file, len(array), array.shape[1:], spacing, get_geometry(properties), is_series, faults)


# -------------------------------------------------------------------------------------------------- one file


def find_intensity_faults(image: np.ndarray) -> list[Fault]:
    """Find NaN and infinity."""
    # minimum and maximum carry them along, and need no array of flags
    if not image.size or np.isfinite([image.min(), image.max()]).all():
        return []
    return [describe_non_finite(int(image.size - np.count_nonzero(np.isfinite(image))))]


def find_label_faults(label: np.ndarray, expected: Sequence[int] | None) -> tuple[list[Fault], frozenset[int]]:
    """Find values of a label that are not expected (None: any may be).

    Also return the expected ones that occur.
    """
    faults = find_intensity_faults(label)
    if faults or not label.size:
        return faults, frozenset()
    present = _distinct(label)
    if expected is None:
        return [], frozenset(map(int, present))
    strange = sorted(set(present) - set(expected))
    faults = (
        [
            Fault(
                "a label has unexpected values",
                enumerate_some(strange),
                enumerate_some(expected, 30),
                "correct the label file, or name these values in 'labels' of dataset.json",
            )
        ]
        if strange
        else []
    )
    return faults, frozenset(int(value) for value in present if value in set(expected))


def _distinct(label: np.ndarray) -> list[float]:
    """Return the distinct values. Whole numbers are marked in a table, which takes a tenth of the time of sorting."""
    low, high = float(label.min()), float(label.max())
    if low >= 0 and high < 2**16:
        whole = label.astype(np.uint16)
        if np.array_equal(whole, label):
            occurs = np.zeros(int(high) + 1, dtype=bool)
            occurs[whole.ravel()] = True
            return [float(value) for value in np.flatnonzero(occurs)]
    return [float(value) for value in np.unique(label)]


# -------------------------------------------------------------------------------------------------- several files


def find_channel_faults(volumes: Sequence[_Volume], channels: Sequence[str]) -> list[Fault]:
    """Compare the number of channels read with those that dataset.json names."""
    number = sum(volume.num_channels for volume in volumes)
    if number == len(channels):
        return []
    expected = f"{len(channels)}: {enumerate_some(channels)}"
    if any(volume.is_series for volume in volumes):
        return [
            Fault(
                "an image is a series (4D)",
                f"{number} volumes",
                expected,
                "store each volume that is a channel in a 3D file of its own, CASE_0000, CASE_0001 ...; split "
                "time points into cases",
            )
        ]
    if any(volume.num_channels > 1 for volume in volumes):
        return [
            Fault(
                "an image has another number of colours than channels are named",
                f"{number} in {Path(volumes[0].file).name}",
                expected,
                "name one channel per colour in channel_names (red, "
                "green, blue, and alpha where files have it), or convert the image",
            )
        ]
    return [
        Fault(
            "a case has another number of channels",
            str(number),
            expected,
            "add the files that are missing (CASE_0001 ...), remove those too many, or correct channel_names",
        )
    ]


def _compare(report: CaseReport, files: CaseFiles, first: _Volume, other: _Volume) -> None:
    """Report where a file differs from the first image of its case in shape, spacing, origin or direction."""
    kind = "label and image" if other.file == files.label else "images of a case"
    if other.shape != first.shape:
        _add(
            report,
            files,
            other.file,
            [Fault(f"{kind} differ in shape", _by(other.shape), _by(first.shape), _SHAPE_REMEDY)],
        )
        return  # nothing else can fit
    if not (len(other.spacing) == len(first.spacing) and np.allclose(first.spacing, other.spacing)):
        _add(
            report,
            files,
            other.file,
            [
                Fault(
                    f"{kind} differ in spacing",
                    f"{enumerate_some(other.spacing)} mm",
                    f"{enumerate_some(first.spacing)} mm",
                    _SPACING_REMEDY,
                )
            ],
        )
        return  # places in space differ as a consequence
    displacement = find_displacement(first.geometry, other.geometry, first.shape)
    if displacement is not None:
        _add(
            report,
            files,
            other.file,
            [
                Fault(
                    f"{kind} differ in {displacement.what}" + ("" if displacement.is_material else " slightly"),
                    f"{displacement.found} (off by up to {displacement.millimetres:.3g} mm)",
                    displacement.expected,
                    _PLACE_REMEDY,
                )
            ],
            is_error=displacement.is_material,
        )


def _add(report: CaseReport, files: CaseFiles, file: str, faults: Sequence[Fault], *, is_error: bool = True) -> None:
    report.findings += [Finding(files.case, relative(file, files.folder), *fault[:4], is_error) for fault in faults]


def _report_doubts(report: CaseReport, files: CaseFiles, file: str, faults: Sequence[Fault]) -> list[Fault]:
    """Report the faults that are worth a warning only, and return the others."""
    _add(report, files, file, [fault for fault in faults if not fault.is_error], is_error=False)
    return [fault for fault in faults if fault.is_error]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
