"""Turn dataset ids into folder names and back: 4 <-> Dataset004_Hippocampus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.legacy_names import file_helpers_of

if TYPE_CHECKING:
    import numpy as np

__getattr__ = file_helpers_of(__name__)


def find_candidate_datasets(dataset_id: int) -> np.ndarray:
    """Return the sorted names of all dataset folders with this id in the three roots.

    Id 100 does not match Dataset1000_x. Roots that are unset or missing are passed over.
    """
    import numpy as np

    prefix = f"Dataset{dataset_id:03d}"
    # Another digit after the prefix belongs to a longer id.
    belongs = re.compile(rf"{prefix}(?!\d)").match
    names = [
        folder.name
        for root in _existing_roots()
        for folder in root.iterdir()
        if belongs(folder.name) and folder.is_dir()
    ]
    return np.unique(names)


def convert_id_to_dataset_name(dataset_id: int) -> str:
    """Return the name of the one dataset with this id.

    Raises:
        RuntimeError: No dataset, or more than one, has the id.
    """
    candidates = find_candidate_datasets(dataset_id)
    if len(candidates) == 1:
        return candidates[0]
    roots = ", ".join(f"{root.env_var_name}={root.get()}" for root in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results))
    if len(candidates) == 0:
        raise RuntimeError(
            f"no dataset with id {dataset_id} found: expected a folder named "
            f"Dataset{dataset_id:03d}_NAME in one of {roots}"
        )
    raise RuntimeError(
        f"several datasets have the id {dataset_id}: {', '.join(candidates)}. Rename or remove all but "
        f"one of them in {roots}"
    )


def convert_dataset_name_to_id(dataset_name: str) -> int:
    """Return the id in a dataset name: 4 for Dataset004_Hippocampus.

    Raises:
        AssertionError: The name does not start with Dataset.
        ValueError: No number of at least three digits follows.
    """
    assert dataset_name.startswith("Dataset"), f"{dataset_name!r} is no dataset name: it does not start with 'Dataset'"
    match = re.match(r"Dataset(\d{3,})", dataset_name)
    if match is None:
        raise ValueError(
            f"{dataset_name!r} is no dataset name: three or more digits must follow 'Dataset', as in "
            "Dataset004_Hippocampus"
        )
    return int(match[1])


def maybe_convert_to_dataset_name(dataset_name_or_id: int | str) -> str:
    """Return a dataset name for a name or an id.

    A name is not checked; an id may be a number or text.

    Raises:
        ValueError: The text is neither a name nor a number.
        RuntimeError: No dataset, or more than one, has the id.
    """
    if isinstance(dataset_name_or_id, str):
        if dataset_name_or_id.startswith("Dataset"):
            return dataset_name_or_id
        try:
            dataset_name_or_id = int(dataset_name_or_id)
        except ValueError as error:
            raise ValueError(
                f"{dataset_name_or_id!r} is neither a dataset id (a whole number such as 4) nor a dataset "
                "name (such as Dataset004_Hippocampus)"
            ) from error
    return convert_id_to_dataset_name(int(dataset_name_or_id))


def _existing_roots() -> list[Path]:
    roots = [Path(root.require()) for root in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results) if root.is_set()]
    return [root for root in roots if root.is_dir()]
