"""Write postprocessing.pkl and postprocessing.json, and read either without running anything that stands in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2.evaluation.summary import label_or_region_to_key, save_summary_json
from nnunetv2.postprocessing.components import remove_all_but_largest_component_from_segmentation
from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.json_files import read_json
from nnunetv2.utilities.restricted_pickle import load_pickle_safely, save_pickle

if TYPE_CHECKING:
    from nnunetv2.postprocessing.decision import Decision

_FUNCTION = remove_all_but_largest_component_from_segmentation
_ADMITTED = {(_FUNCTION.__module__, _FUNCTION.__name__): _FUNCTION}
_KEYWORDS = {"labels_or_regions", "background_label"}

Functions = list[Callable[..., np.ndarray]]
Keywords = list[dict[str, Any]]


def save_decision(folder: str | os.PathLike[str], decision: Decision, functions: Functions, kwargs: Keywords) -> None:
    """Write both files into the folder of predictions, and summary.json if there is none."""
    folder = Path(folder)
    before, after = decision.summary_before(), decision.summary_after(str(folder / "postprocessed"))
    if not (folder / "summary.json").is_file():
        save_summary_json(before, folder / "summary.json")
    save_pickle((functions, kwargs), folder / "postprocessing.pkl", _ADMITTED)
    content = {
        "input_folder": _means(before),
        "postprocessed": _means(after),
        "postprocessing_fns": [function.__name__ for function in functions],
        "postprocessing_kwargs": kwargs,
    }
    recursive_fix_for_json_export(content)
    save_json_atomically(content, folder / "postprocessing.json")


def load_functions(path: str | os.PathLike[str]) -> tuple[Functions, Keywords]:
    """Read which functions to apply from a JSON file.

    Or from a pickle, or better the JSON file beside it.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: The content is no postprocessing, names another function, or is no plain data.
    """
    path = Path(path)
    twin = path.with_suffix(".json")
    if twin.is_file():
        return _load_json(twin)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; nnUNetv2_determine_postprocessing and "
            "nnUNetv2_find_best_configuration write postprocessing.pkl"
        )
    return _load_pickle(path)


def _load_json(path: Path) -> tuple[Functions, Keywords]:
    try:
        content = read_json(path)
        names, kwargs = content["postprocessing_fns"], content["postprocessing_kwargs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no postprocessing.json: it needs the keys postprocessing_fns and "
            f"postprocessing_kwargs ({error!r})"
        ) from error
    unknown = [name for name in names if name != _FUNCTION.__name__]
    if unknown:
        raise ValueError(
            f"{path} names the postprocessing {', '.join(map(str, unknown))}; only {_FUNCTION.__name__} "
            "is applied from a file. Call functions of your own from Python (apply_postprocessing)"
        )
    return [_FUNCTION] * len(names), _check_keywords(path, len(names), kwargs)


def _load_pickle(path: Path) -> tuple[Functions, Keywords]:
    try:
        content = load_pickle_safely(path, _ADMITTED)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{error}. A pickle can run any program, so that {path.name} is accepted only if it refers to "
            f"nothing but {_FUNCTION.__name__} and plain data. Determine the postprocessing anew, or use "
            "the postprocessing.json written with it"
        ) from error
    is_pair = (
        isinstance(content, (tuple, list))
        and len(content) == 2
        and all(isinstance(part, (tuple, list)) for part in content)
    )
    if not is_pair or any(function is not _FUNCTION for function in content[0]):
        raise ValueError(
            f"{path} is no postprocessing.pkl: expected a list of functions and a list of their keywords, "
            f"it holds a {type(content).__name__}. Was the .pkl file of a case given?"
        )
    return list(content[0]), _check_keywords(path, len(content[0]), content[1])


def _check_keywords(path: Path, count: int, kwargs: Sequence[Mapping[str, Any]]) -> Keywords:
    is_valid = (
        isinstance(kwargs, (list, tuple))
        and len(kwargs) == count
        and all(
            isinstance(entry, Mapping)
            and set(entry) <= _KEYWORDS
            and "labels_or_regions" in entry
            and all(_is_label_data(value) for value in entry.values())
            for entry in kwargs
        )
    )
    if not is_valid:
        raise ValueError(f"{path}: each of the {count} functions needs labels_or_regions: a label, or a list of labels")
    return [{key: _plain(value) for key, value in entry.items()} for entry in kwargs]


def _is_label_data(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_label_data(part) for part in value)
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part) for part in value)
    return int(value)


def _means(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "foreground_mean": summary["foreground_mean"],
        "mean": {label_or_region_to_key(which): scores for which, scores in summary["mean"].items()},
    }
