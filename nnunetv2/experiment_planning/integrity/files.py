"""Find cases whose files are missing, misnamed, empty or out of reach."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.integrity.dataset_json import NAME, get_channel_names
from nnunetv2.experiment_planning.integrity.findings import Finding, count, enumerate_some
from nnunetv2.utilities.file_endings import split_channel

Dataset = Mapping[str, Mapping[str, Any]]
"""Case -> {"images": files, "label": file}."""

MISSING = "file is missing"
OTHER_NUMBER = "the number of cases differs from numTraining"
# Endings of images, so that stray notes and thumbnails are told from cases in a second format.
_IMAGE_ENDINGS = (
    ".nii.gz",
    ".nii",
    ".nrrd",
    ".mha",
    ".mhd",
    ".gipl",
    ".png",
    ".bmp",
    ".tif",
    ".tiff",
    ".jpg",
    ".jpeg",
    ".dcm",
    ".npy",
    ".npz",
    ".h5",
    ".img",
    ".hdr",
)


def check_files(folder: Path, dataset_json: Mapping[str, Any], dataset: Dataset) -> list[Finding]:
    """Check the number of cases, their labels and their channels.

    Channels are 0, 1, 2 and so on.
    """
    if not dataset:
        return [_describe_no_cases(folder, dataset_json)]
    findings = []
    if len(dataset) != dataset_json["numTraining"]:
        findings.append(
            Finding(
                "",
                NAME,
                OTHER_NUMBER,
                f"{count(len(dataset), 'case')}, such as {enumerate_some(dataset, 5)}",
                count(dataset_json["numTraining"], "case"),
                "correct numTraining, or add the cases that are missing",
            )
        )
    if "dataset" in dataset_json:
        findings += _check_order_in_lists(dataset, dataset_json["file_ending"])
    else:
        findings += _check_folders(folder, dataset_json, dataset)
    for case, files in dataset.items():
        findings += _check_access(folder, case, [*files["images"], files["label"]])
    return findings


def relative(file: str | Path, folder: Path) -> str:
    """Return a file relative to the dataset's folder if it lies in it.

    Else as it is.
    """
    path = Path(file)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


# -------------------------------------------------------------------------------------------------- all files


def _check_access(folder: Path, case: str, files: list[str]) -> Iterator[Finding]:
    for file in files:
        name = relative(file, folder)
        if not Path(file).is_file():
            kind = "label" if file == files[-1] else "image"
            found = f"a link to {Path(file).readlink()}" if Path(file).is_symlink() else f"no {kind}"
            yield Finding(
                case,
                name,
                MISSING,
                found,
                "",
                "add the file, or remove the other files of the case and correct numTraining (and 'dataset', "
                "if dataset.json lists files)",
            )
        elif not Path(file).stat().st_size:
            yield Finding(case, name, "file is empty", "0 bytes", "", "copy the file again, or leave the case out")
        elif (reason := _why_closed(file)) is not None:
            yield Finding(
                case,
                name,
                "file may not be read",
                reason,
                "",
                "give yourself the right to read it (chmod u+r FILE, or ask its owner)",
            )


def _why_closed(file: str) -> str | None:
    try:
        with Path(file).open("rb"):
            return None
    except OSError as error:
        return error.strerror or str(error)


# -------------------------------------------------------------------------------------------------- lists of files


def _check_order_in_lists(dataset: Dataset, file_ending: str) -> Iterator[Finding]:
    """Check the order of channels that are named _0000, _0001 ... of the same case in the same folder."""
    for case, files in dataset.items():
        parts = [split_channel(Path(file).name, file_ending) for file in files["images"]]
        stems = {(Path(file).parent, part and part[0]) for file, part in zip(files["images"], parts)}
        channels = [part[1] for part in parts if part is not None]
        if len(stems) == 1 and channels != sorted(set(channels)):
            yield Finding(
                case,
                NAME,
                "channels are listed out of order",
                enumerate_some(map(_name, files["images"])),
                "_0000, _0001 ...",
                "list the images of each case in the order of channel_names, each once",
            )
        wrong = [file for file in (*files["images"], files["label"]) if not file.endswith(file_ending)]
        if wrong:
            yield Finding(
                case,
                NAME,
                "a file has another ending than the dataset",
                enumerate_some(map(_name, wrong), 3),
                file_ending,
                "convert the files so that all images and labels have one ending",
            )
        if not files["images"]:
            yield Finding(case, NAME, "no image is listed", "images: []", "", "list one image per channel")


# -------------------------------------------------------------------------------------------------- folders


def _check_folders(folder: Path, dataset_json: Mapping[str, Any], dataset: Dataset) -> list[Finding]:
    ending = dataset_json["file_ending"]
    images, labels = (_names(folder / name) for name in ("imagesTr", "labelsTr"))
    findings = []
    wanted = min(
        len(get_channel_names(dataset_json)),
        max(split_channel(_name(files["images"][-1]), ending)[1] + 1 for files in dataset.values()),
    )
    for case, files in dataset.items():
        findings += _check_channels(case, files["images"], ending, wanted)
    for name in labels:
        if name.endswith(ending) and name.removesuffix(ending) not in dataset:
            case = name.removesuffix(ending)
            findings.append(
                Finding(
                    case,
                    f"labelsTr/{name}",
                    "a label has no image",
                    "no image",
                    f"imagesTr/{case}_0000{ending}",
                    "add its images, or move the label out of labelsTr",
                )
            )
    findings += _check_strays("imagesTr", images, lambda name: split_channel(name, ending), f"CASE_0000{ending}")
    return findings + _check_strays("labelsTr", labels, lambda name: name.endswith(ending), f"CASE{ending}")


def _check_channels(case: str, images: list[str], ending: str, wanted: int) -> list[Finding]:
    """Find gaps in the numbers of channels, and channels missing at the end.

    Args:
        wanted: As many files as a case of this dataset has. That may be fewer than channels, since a file of colours
            holds several; how many shows when it is read.
    """
    present = {split_channel(_name(image), ending)[1] for image in images}
    return [
        Finding(
            case,
            f"imagesTr/{case}_{channel:04d}{ending}",
            "a channel is missing",
            enumerate_some(map(_name, images), 4),
            f"{count(wanted, 'file')}, numbered from _0000",
            "add the file, or number the channels of the case _0000, _0001 ... without gaps",
        )
        for channel in range(max(wanted, max(present) + 1))
        if channel not in present
    ][:3]


def _check_strays(folder: str, names: list[str], is_expected: Callable[[str], object], pattern: str) -> list[Finding]:
    findings = []
    for name in names:
        if name.startswith("."):
            if name.endswith(_IMAGE_ENDINGS):
                findings.append(
                    Finding(
                        "",
                        f"{folder}/{name}",
                        "a hidden file looks like an image",
                        name,
                        "",
                        "delete it; some systems leave such files behind when they copy",
                    )
                )
        elif name.endswith(_IMAGE_ENDINGS) and not is_expected(name):
            findings.append(
                Finding(
                    "",
                    f"{folder}/{name}",
                    "a file name does not fit the dataset",
                    name,
                    pattern,
                    "rename or convert the file so that it has the channel (images only) and the "
                    "file_ending of dataset.json, or move it elsewhere",
                )
            )
    return findings


def _describe_no_cases(folder: Path, dataset_json: Mapping[str, Any]) -> Finding:
    if "dataset" in dataset_json:
        return Finding(
            "",
            NAME,
            "no case is listed",
            "'dataset': {}",
            count(dataset_json["numTraining"], "case"),
            "list the cases under 'dataset', or remove this key to use imagesTr and labelsTr",
        )
    ending = dataset_json["file_ending"]
    endings = Counter("".join(Path(name).suffixes[-2:]) for name in _names(folder / "imagesTr"))
    found = enumerate_some((f"{number} files ending in {text or 'nothing'}" for text, number in endings.items()), 4)
    return Finding(
        "",
        "imagesTr",
        "no image belongs to the dataset",
        found or "an empty folder",
        f"files named CASE_0000{ending}",
        "correct file_ending in dataset.json, or rename the images",
    )


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())


def _name(file: str) -> str:
    return Path(file).name
