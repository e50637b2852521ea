"""Read dataset.json and find the faults of its content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.errors import InvalidDatasetError
from nnunetv2.experiment_planning.integrity.findings import Finding, enumerate_some
from nnunetv2.utilities.json_files import KINDS, JsonFileError, kind_of, read_json

REQUIRED_KEYS = ("labels", "channel_names", "numTraining", "file_ending")
NAME = "dataset.json"


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Read dataset.json; check its keys and the folders it speaks of.

    Raises:
        InvalidDatasetError: They are not.
    """
    file = locate_dataset_json(folder)
    content = parse_dataset_json(file, refuse_duplicates=True)
    require_keys(content, file, REQUIRED_KEYS)
    if "dataset" not in content:
        for name in ("imagesTr", "labelsTr"):
            if not (folder / name).is_dir():
                raise InvalidDatasetError(
                    f"{folder} has no folder {name}. Remedy: create it with the training cases, "
                    f"or list their files under the key 'dataset' of {NAME}"
                )
    return content


def locate_dataset_json(folder: Path) -> Path:
    """Return the dataset.json of a folder.

    Raises:
        InvalidDatasetError: There is none.
    """
    file = folder / NAME
    if not file.is_file():
        raise InvalidDatasetError(
            f"{folder} has no {NAME}. Remedy: write one, for example with "
            f"nnunetv2.dataset_conversion.generate_dataset_json; documentation/dataset-format.md "
            f"describes it"
        )
    return file


def require_keys(content: Mapping[str, Any], file: Path, keys: Sequence[str]) -> None:
    """Check that dataset.json has keys; `modality`, their older name, stands for `channel_names`.

    Raises:
        InvalidDatasetError: One is missing. The message also lists the keys that nothing uses.
    """
    accepted = {*content, "channel_names"} if "modality" in content else set(content)
    missing = [key for key in keys if key not in accepted]
    if missing:
        unused = [key for key in content if key not in REQUIRED_KEYS]
        raise InvalidDatasetError(
            f"{file} lacks {enumerate_some(missing)}. Remedy: add what is missing. Required: "
            f"{enumerate_some(REQUIRED_KEYS)}. Present: {enumerate_some(content)}. Not used: "
            f"{enumerate_some(unused) or 'none'}"
        )


def parse_dataset_json(file: Path, *, refuse_duplicates: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        refuse_duplicates: Refuse keys that occur twice in the same braces, of which a parser keeps the last only.

    Raises:
        InvalidDatasetError: It is no valid JSON, or no object. The message names the file.
    """
    try:
        return read_json(file, refuse_duplicates=refuse_duplicates)
    except JsonFileError as error:
        raise InvalidDatasetError(str(error)) from error


# -------------------------------------------------------------------------------------------------- content


def check_dataset_json(content: Mapping[str, Any]) -> list[Finding]:
    """Find wrong types and contradictions.

    The result holds errors if cases cannot be judged by this dataset.json.
    """
    findings = [
        *_check_labels(content["labels"]),
        *_check_channels(get_channel_names(content)),
        *_check_simple_keys(content),
    ]
    if not findings:
        findings += _check_meaning_of_labels(content)
    return findings


def get_channel_names(content: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the names of the channels, which older files call modality."""
    return content["channel_names" if "channel_names" in content else "modality"]


def determine_expected_labels(content: Mapping[str, Any]) -> list[int]:
    """Return all values that labels may hold, the ignore label included.

    Raises:
        InvalidDatasetError: They are not consecutive numbers from 0.
    """
    from nnunetv2.plans.label_manager import LabelManager

    manager = LabelManager(content["labels"], regions_class_order=content.get("regions_class_order"))
    labels = [int(label) for label in manager.all_labels]
    if manager.has_ignore_label:
        labels.append(int(manager.ignore_label))
    jumps = [f"{a} is followed by {b}" for a, b in pairwise(labels) if b != a + 1]
    if jumps or labels[0] != 0:
        raise InvalidDatasetError(
            f"labels must be consecutive numbers from 0, but {NAME} has "
            f"{enumerate_some(labels)}" + "".join(f"; {jump}" for jump in jumps)
        )
    return labels


def _check_labels(labels: Any) -> list[Finding]:
    if not isinstance(labels, dict):
        return [_of_key("labels", kind_of(labels), KINDS[dict], 'write {"background": 0, "NAME": 1, ...}')]
    if labels and all(str(name).lstrip("-").isdecimal() and isinstance(value, str) for name, value in labels.items()):
        return [
            _of_key(
                "labels",
                "numbers followed by names, as in nnU-Net 1",
                "names followed by numbers",
                'turn the entries round: {"background": 0, "NAME": 1, ...}',
            )
        ]
    findings = [
        _of_key(
            "labels",
            f"{name!r}: {json.dumps(value)}",
            "a whole number from 0, or a list of them",
            "write labels as whole numbers, without quotes and decimals",
        )
        for name, value in labels.items()
        if not _is_label(value)
    ]
    if not findings and labels.get("background") != 0:
        found = f"'background': {labels['background']}" if "background" in labels else "no background"
        findings.append(
            _of_key("labels", found, "'background': 0", 'label the background 0 in all files and write "background": 0')
        )
    if not findings and isinstance(labels.get("ignore"), list):
        findings.append(
            _of_key(
                "labels",
                f"'ignore': {labels['ignore']}",
                "one whole number",
                "write the ignore label as a number, not as a list",
            )
        )
    return findings


def _check_channels(channels: Any) -> list[Finding]:
    remedy = 'write {"0": "NAME", "1": "NAME", ...}, in the order of the files _0000, _0001 and so on'
    if not isinstance(channels, dict) or not channels:
        return [
            _of_key("channel_names", kind_of(channels) if channels else "nothing", "a name for each channel", remedy)
        ]
    findings = [
        _of_key("channel_names", f"{number!r}: {json.dumps(name)}", "a name in quotes", remedy)
        for number, name in channels.items()
        if not isinstance(name, str)
    ]
    if list(channels) != [str(i) for i in range(len(channels))]:
        # normalization is chosen in the order of the entries, whatever their numbers say
        findings.append(
            _of_key(
                "channel_names", f"the order {enumerate_some(channels)}", enumerate_some(range(len(channels))), remedy
            )
        )
    return findings


def _check_simple_keys(content: Mapping[str, Any]) -> list[Finding]:
    findings = []
    number, ending = content["numTraining"], content["file_ending"]
    if not _is_whole(number):
        findings.append(
            _of_key(
                "numTraining",
                f"{kind_of(number)}, {json.dumps(number)}",
                KINDS[int],
                "write the number of training cases, without quotes",
            )
        )
    if not isinstance(ending, str) or not ending.startswith(".") or len(ending) < 2:
        findings.append(
            _of_key(
                "file_ending",
                json.dumps(ending),
                "an ending with its dot, such as .nii.gz",
                'write the ending of all images and labels, with the dot: ".nii.gz", ".png" ...',
            )
        )
    findings += _check_lists(content.get("dataset", {}))
    order = content.get("regions_class_order")
    if order is not None and not (isinstance(order, list) and all(map(_is_whole, order))):
        findings.append(
            _of_key(
                "regions_class_order",
                json.dumps(order),
                "a list of whole numbers",
                "write one label per region, such as [1, 2, 3]",
            )
        )
    return findings + _check_reader_name(content.get("overwrite_image_reader_writer"))


def _check_lists(dataset: Any) -> list[Finding]:
    remedy = 'write {"CASE": {"images": ["FILE", ...], "label": "FILE"}, ...}'
    if not isinstance(dataset, dict):
        return [_of_key("dataset", kind_of(dataset), KINDS[dict], remedy)]
    return [
        _of_key("dataset", f"{case!r}: {json.dumps(entry)}", "a list of images and a label", remedy)
        for case, entry in dataset.items()
        if not _is_case(entry)
    ]


def _check_reader_name(name: Any) -> list[Finding]:
    if name in (None, "None"):
        return []
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name

    try:
        recursive_find_reader_writer_by_name(str(name))
    except (RuntimeError, ValueError):
        known = enumerate_some(reader.__name__ for reader in LIST_OF_IO_CLASSES)
        return [
            _of_key(
                "overwrite_image_reader_writer",
                json.dumps(name),
                f"one of {known}, or a class of your own",
                "correct the name, remove the key, or put the module that defines the class into nnunetv2/imageio",
            )
        ]
    return []


def _check_meaning_of_labels(content: Mapping[str, Any]) -> list[Finding]:
    """Check labels together: consecutive, ignore above all others, an order for regions."""
    try:
        determine_expected_labels(content)
    except (ValueError, RuntimeError, AssertionError) as error:
        # the label manager names its expectation, and so does the check for gaps
        return [_of_key("labels", str(error).removeprefix("dataset.json: "), "", _remedy_for_labels(content))]
    return _check_order_of_regions(content)


def _remedy_for_labels(content: Mapping[str, Any]) -> str:
    labels = content["labels"]
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        regions = [name for name, value in labels.items() if name != "ignore" and value not in (0, [0])]
        given = content.get("regions_class_order")
        if given is None or len(given) != len(regions):
            return f"give regions_class_order one label for each of {enumerate_some(regions)}, in this order"
    return "number the labels 0, 1, 2 ... without gaps, ignore last, in dataset.json and in the label files alike"


def _check_order_of_regions(content: Mapping[str, Any]) -> list[Finding]:
    labels, order = content["labels"].values(), content.get("regions_class_order")
    if order is None or not any(isinstance(value, list) and len(value) > 1 for value in labels):
        return []
    known = {label for value in labels for label in (value if isinstance(value, list) else [value])}
    strange = [label for label in order if label not in known]
    if not strange and len(set(order)) == len(order):
        return []
    finding = _of_key(
        "regions_class_order",
        enumerate_some(order),
        "each label of a region once",
        "check that predictions shall carry these labels",
        is_error=False,
    )
    return [finding]


def _of_key(key: str, found: str, expected: str, remedy: str, *, is_error: bool = True) -> Finding:
    return Finding(
        "",
        NAME,
        f"'{key}' of {NAME} is wrong" if is_error else f"'{key}' of {NAME} is unusual",
        found,
        expected,
        remedy,
        is_error,
    )


def _is_label(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(_is_whole(entry) and entry >= 0 for entry in values)


def _is_case(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("label"), str)
        and isinstance(entry.get("images"), list)
        and all(isinstance(image, str) for image in entry["images"])
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
