"""List the cases of a raw dataset and the files that belong to them."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.utilities.file_endings import list_names, split_channel
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.legacy_names import file_helpers_of

if TYPE_CHECKING:
    import numpy as np

__getattr__ = file_helpers_of(__name__)
logger = logging.getLogger(__name__)


def get_identifiers_from_splitted_dataset_folder(folder: str, file_ending: str) -> np.ndarray:
    """Return the sorted, distinct case identifiers of a folder of images CASE_XXXX.ENDING.

    Files that have the ending but no underscore and four digits before it belong to no case; a warning names them.
    """
    import numpy as np

    return np.array(sorted(_list_cases(folder, file_ending)), dtype=str)


def create_paths_fn(folder: str, files: Iterable[str], file_ending: str, f: str) -> list[str]:
    """Return the paths of case `f`'s channels among `files` in `folder`.

    In the order of `files`.
    """
    return [os.path.join(folder, name) for name in files if (split_channel(name, file_ending) or ("",))[0] == f]


def create_lists_from_splitted_dataset_folder(
    folder: str, file_ending: str, identifiers: Sequence[str] | None = None, num_processes: int = 12
) -> list[list[str]]:
    """Return one sorted list of channel files per case.

    Args:
        folder: Folder of images CASE_XXXX.ENDING.
        file_ending: With dot.
        identifiers: The cases wanted, in this order; all of the folder by default. A case without files gets an empty
            list.
        num_processes: Not needed; kept because callers pass it.
    """
    cases = _list_cases(folder, file_ending, warn=identifiers is None)
    identifiers = sorted(cases) if identifiers is None else identifiers
    return [cases.get(str(case), []) for case in identifiers]  # str(): identifiers may be NumPy strings


def get_filenames_of_train_images_and_targets(
    raw_dataset_folder: str, dataset_json: dict | None = None
) -> dict[str, dict]:
    """Return the files of all training cases: {case: {"images": [one per channel], "label": file}}.

    They are listed by `dataset` in dataset.json, where relative paths start at the dataset's folder and environment
    variables are expanded; without that key they are found in imagesTr and labelsTr. Whether they exist is not checked.

    Raises:
        ValueError: An entry of `dataset` lacks its images or its label.
    """
    if dataset_json is None:
        dataset_json = read_json(Path(raw_dataset_folder, "dataset.json"))
    if "dataset" in dataset_json:
        return {
            case: _resolve_entry(raw_dataset_folder, case, entry) for case, entry in dataset_json["dataset"].items()
        }
    labels_folder, ending = os.path.join(raw_dataset_folder, "labelsTr"), dataset_json["file_ending"]
    cases = _list_cases(os.path.join(raw_dataset_folder, "imagesTr"), ending)
    return {
        case: {"images": cases[case], "label": os.path.join(labels_folder, f"{case}{ending}")} for case in sorted(cases)
    }


def _resolve_entry(folder: str, case: str, entry: dict) -> dict:
    if "images" not in entry or "label" not in entry:
        raise ValueError(
            f"dataset.json in {folder}: case {case} needs the keys 'images' (a list) and 'label', "
            f"it has {sorted(entry)}"
        )
    return {
        **entry,
        "images": [_resolve_path(folder, image) for image in entry["images"]],
        "label": _resolve_path(folder, entry["label"]),
    }


def _resolve_path(folder: str, path: str) -> str:
    path = os.path.expandvars(path)
    # abspath also removes the `..` with which entries reach files of other datasets; links stay as they are
    return path if Path(path).is_absolute() else os.path.abspath(os.path.join(folder, path))  # noqa: PTH100


def _list_cases(folder: str, file_ending: str, *, warn: bool = True) -> dict[str, list[str]]:
    """Return the images of a folder by case, channels in order, in one pass over the folder."""
    cases, strangers = defaultdict(list), []
    for name in list_names(folder, file_ending):
        parts = split_channel(name, file_ending)
        if parts is None:
            strangers.append(name)
        else:
            cases[parts[0]].append(os.path.join(folder, name))
    if strangers and warn:
        logger.warning(
            "%s: %d files are ignored because their name does not end in _0000%s, _0001%s, ...: %s%s",
            folder,
            len(strangers),
            file_ending,
            file_ending,
            ", ".join(strangers[:5]),
            ", ..." if len(strangers) > 5 else "",
        )
    return dict(cases)
