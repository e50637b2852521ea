"""Check a raw dataset before time is spent on it, and list everything that is wrong with it at once."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2.experiment_planning.case_pool import map_cases
from nnunetv2.experiment_planning.errors import InvalidDatasetError
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

REQUIRED_KEYS = ("labels", "channel_names", "numTraining", "file_ending")


@dataclass
class Findings:
    """What was noticed about a dataset: lines of (case or file, text). Errors fail the check, warnings do not."""

    errors: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)

    def extend(self, other: Findings) -> None:
        self.errors += other.errors
        self.warnings += other.warnings


def verify_dataset_integrity(folder: str, num_processes: int = 8) -> None:
    """Check dataset.json, the presence of all files, and the content of every case.

    Findings of all cases are printed as a table before the check fails.

    Args:
        folder: The raw dataset, with dataset.json in it.

    Raises:
        InvalidDatasetError: There is an error; also an AssertionError and a RuntimeError.
        FileNotFoundError: A file that dataset.json lists does not exist.
    """
    root = Path(folder)
    dataset_json = read_dataset_json(root)
    dataset = get_filenames_of_train_images_and_targets(str(root), dataset_json)
    findings = check_files(root, dataset_json, dataset)
    expected_labels = determine_expected_labels(dataset_json)
    if findings.errors:
        _report(root.name, findings)  # the cases cannot be read, or are not those that are meant

    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    example = next(iter(dataset.values()))["images"][0]
    reader = determine_reader_writer_from_dataset_json(dataset_json, example)
    num_channels = len(_channel_names(dataset_json))
    arguments = {str(case): (str(case), files["images"], files["label"], reader, num_channels, expected_labels)
                 for case, files in dataset.items()}
    for of_case in map_cases(inspect_case, arguments, num_processes=num_processes, description="Integrity check"):
        findings.extend(of_case)
    _report(root.name, findings)
    print(f"\n{root.name} passed the integrity check: {len(dataset)} cases, {num_channels} channel(s), labels "
          f"{_list(expected_labels)}.\nAn image may still be wrong in ways no program sees: look at some of them.\n")


# -------------------------------------------------------------------------------------------------- dataset.json


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Read dataset.json and check that it and the folders it speaks of are there, and its keys complete."""
    file = folder / "dataset.json"
    if not file.is_file():
        raise InvalidDatasetError(f"{folder} has no dataset.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidDatasetError(f"{file} is not valid JSON: {error}") from error
    if "dataset" not in content:
        for name in ("imagesTr", "labelsTr"):
            if not (folder / name).is_dir():
                raise InvalidDatasetError(f"{folder} has no folder {name}, nor does its dataset.json list files under "
                                          f"the key 'dataset'")
    _check_keys(content, file)
    return content


def _check_keys(content: Mapping[str, Any], file: Path) -> None:
    accepted = {*content, "channel_names"} if "modality" in content else set(content)
    missing = [key for key in REQUIRED_KEYS if key not in accepted]
    if missing:
        unused = [key for key in content if key not in REQUIRED_KEYS]
        raise InvalidDatasetError(f"{file} lacks {_list(missing)}. Required: {_list(REQUIRED_KEYS)}. Present: "
                                  f"{_list(content)}. Not used: {_list(unused)}")


def _channel_names(dataset_json: Mapping[str, Any]) -> Mapping[str, str]:
    return dataset_json["channel_names" if "channel_names" in dataset_json else "modality"]


def determine_expected_labels(dataset_json: Mapping[str, Any]) -> list[int]:
    """Return all values that labels may hold, the ignore label included.

    Raises:
        InvalidDatasetError: They are not consecutive numbers from 0.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    manager = LabelManager(dataset_json["labels"], regions_class_order=dataset_json.get("regions_class_order"))
    labels = [int(label) for label in manager.all_labels]
    if manager.has_ignore_label:
        labels.append(int(manager.ignore_label))
    jumps = [f"{a} is followed by {b}" for a, b in zip(labels, labels[1:]) if b != a + 1]
    if jumps or labels[0] != 0:
        raise InvalidDatasetError(f"labels must be consecutive numbers from 0, but dataset.json has {_list(labels)}"
                                  + "".join(f"; {jump}" for jump in jumps))
    return labels


# -------------------------------------------------------------------------------------------------- files


def check_files(folder: Path, dataset_json: Mapping[str, Any], dataset: Mapping[str, Mapping[str, Any]]) -> Findings:
    """Check the number of cases and that each has its label and channels 0, 1, 2 and so on."""
    if "dataset" in dataset_json:
        listed = [file for files in dataset.values() for file in (*files["images"], files["label"])]
        absent = [str(file) for file in listed if not Path(file).is_file()]
        if absent:
            raise FileNotFoundError(f"dataset.json lists {len(absent)} file(s) that do not exist: {_list(absent, 20)}")
    findings = Findings()
    if len(dataset) != dataset_json["numTraining"] or not dataset:
        findings.errors.append(("dataset.json", f"numTraining is {dataset_json['numTraining']}, but there are "
                                                f"{len(dataset)} cases, such as {_list(dataset, 5)}"))
    if list(_channel_names(dataset_json)) != [str(i) for i in range(len(_channel_names(dataset_json)))]:
        findings.warnings.append(("dataset.json", f"channels are not numbered 0, 1, 2 ... in order: "
                                                  f"{_list(_channel_names(dataset_json))}"))
    if "dataset" not in dataset_json:
        findings.extend(_check_folders(folder, dataset_json["file_ending"], dataset))
    return findings


def _check_folders(folder: Path, file_ending: str, dataset: Mapping[str, Mapping[str, Any]]) -> Findings:
    findings = Findings()
    labels = {file.name for file in (folder / "labelsTr").iterdir() if file.name.endswith(file_ending)}
    for case, files in dataset.items():
        if f"{case}{file_ending}" not in labels:
            findings.errors.append((str(case), f"has no label labelsTr/{case}{file_ending}"))
        channels = [_channel_of(image, file_ending) for image in files["images"]]
        if channels != list(range(len(channels))) or not channels:
            findings.errors.append((str(case), f"has the image files {_list(map(_name, files['images'])) or 'none'}; "
                                               f"they must end in _0000{file_ending}, _0001{file_ending} ..."))
    for orphan in sorted(labels - {f"{case}{file_ending}" for case in dataset}):
        findings.warnings.append((orphan, "is a label without image and will not be used"))
    return findings


def _channel_of(image: str, file_ending: str) -> int | None:
    match = re.fullmatch(r".*_(\d{4})", _name(image)[:-len(file_ending)])
    return int(match[1]) if match else None


# -------------------------------------------------------------------------------------------------- cases


def inspect_case(case: str, image_files: Sequence[str], label_file: str, readerclass: type,
                 expected_num_channels: int, expected_labels: Sequence[int]) -> Findings:
    """Read one case and report on its label values and on whether image and label fit."""
    reader = readerclass()
    try:
        images, image_properties = reader.read_images(image_files)
        label, label_properties = reader.read_seg(label_file)
    except Exception as error:  # readers raise whatever their library raises; all of it belongs in the table
        return Findings(errors=[(case, f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")])
    errors = find_label_errors(label, expected_labels)
    errors += find_mismatches(images, image_properties, label, label_properties, expected_num_channels)
    warnings = find_geometry_warnings(image_properties, label_properties)
    if not errors and not label.any():
        warnings.append("the label is background only")
    return Findings([(case, text) for text in errors], [(case, text) for text in warnings])


def find_label_errors(label: np.ndarray, expected_labels: Sequence[int]) -> list[str]:
    """Return what is wrong with the values of a label."""
    if not label.size:
        return [f"the label is empty, its shape is {label.shape}"]
    if np.isnan(label).any():
        return ["the label contains NaN"]
    unexpected = np.unique(label[~np.isin(label, expected_labels)])
    if not len(unexpected):
        return []
    return [f"the label contains {_list(f'{value:g}' for value in unexpected[:10].tolist())}"
            f"{' ...' if len(unexpected) > 10 else ''}; expected are {_list(expected_labels)}"]


def find_mismatches(images: np.ndarray, image_properties: Mapping[str, Any], label: np.ndarray,
                    label_properties: Mapping[str, Any], expected_num_channels: int) -> list[str]:
    """Return what is wrong with the image, or between image and label. Shapes and spacings are in array order."""
    errors = []
    if np.isnan(images).any():
        errors.append("the image contains NaN")
    if len(images) != expected_num_channels:
        errors.append(f"the image has {len(images)} channel(s), dataset.json names {expected_num_channels}")
    if images.shape[1:] != label.shape[1:]:
        errors.append(f"the label has shape {label.shape[1:]}, the image {images.shape[1:]}")
    image_spacing, label_spacing = image_properties["spacing"], label_properties["spacing"]
    if not _is_close(image_spacing, label_spacing):
        errors.append(f"the label has spacing {_list(label_spacing)} mm, the image {_list(image_spacing)} mm")
    return errors


def find_geometry_warnings(image_properties: Mapping[str, Any], label_properties: Mapping[str, Any]) -> list[str]:
    """Return where image and label lie differently in space, which the network does not see but a viewer does."""
    warnings = []
    for stuff, keys in (("nibabel_stuff", ("original_affine",)), ("sitk_stuff", ("origin", "direction"))):
        if stuff in image_properties and stuff in label_properties:
            for key in keys:
                of_image, of_label = image_properties[stuff][key], label_properties[stuff][key]
                if not _is_close(of_image, of_label):
                    name = key.replace("original_", "")
                    warnings.append(f"the {name} of the label is {_list(np.ravel(of_label))}, that of the image "
                                    f"{_list(np.ravel(of_image))}")
    return warnings


def verify_labels(label_file: str, readerclass: type, expected_labels: list[int]) -> bool:
    """Return whether a label holds expected values only; print what it holds otherwise."""
    label, _ = readerclass().read_seg(label_file)
    return _print_errors(label_file, find_label_errors(label, expected_labels))


def check_cases(image_files: list[str], label_file: str, expected_num_channels: int, readerclass: type) -> bool:
    """Return whether image and label are free of NaN and fit each other; print what is wrong."""
    reader = readerclass()
    images, image_properties = reader.read_images(image_files)
    label, label_properties = reader.read_seg(label_file)
    errors = ["the label contains NaN"] if np.isnan(label).any() else []
    errors += find_mismatches(images, image_properties, label, label_properties, expected_num_channels)
    for warning in find_geometry_warnings(image_properties, label_properties):
        print(f"Warning: {label_file}: {warning}")
    return _print_errors(label_file, errors)


# -------------------------------------------------------------------------------------------------- reporting


def format_table(title: str, lines: Sequence[tuple[str, str]]) -> str:
    """Lay out findings in two columns, sorted by case."""
    width = max(len(where) for where, _ in lines)
    rows = (f"  {where:<{width}}  {text}" for where, text in sorted(lines, key=lambda line: line[0]))
    return "\n".join([title, *rows])


def _report(dataset_name: str, findings: Findings) -> None:
    if findings.warnings:
        print(format_table(f"\nWarnings for {dataset_name}:", findings.warnings))
    if not findings.errors:
        return
    print(format_table(f"\nErrors in {dataset_name}:", findings.errors))
    where, text = min(findings.errors)
    concerned = len({place for place, _ in findings.errors})
    raise InvalidDatasetError(f"{dataset_name} failed the integrity check: {len(findings.errors)} error(s) in "
                              f"{concerned} place(s), listed above. The first: {where}: {text}")


def _print_errors(label_file: str, errors: Sequence[str]) -> bool:
    for error in errors:
        print(f"Error: {label_file}: {error}")
    return not errors


def _is_close(a: Sequence[float], b: Sequence[float]) -> bool:
    return np.shape(a) == np.shape(b) and np.allclose(a, b)


def _name(file: str) -> str:
    return Path(file).name


def _list(values: Any, at_most: int | None = None) -> str:
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    more = f" and {len(texts) - at_most} more" if at_most is not None and len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more
