"""Read and check the inputs of a planner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.errors import InvalidInputError
from nnunetv2.experiment_planning.experiment_planners.case_geometry import FingerprintWithoutLists
from nnunetv2.preprocessed_data.bad_cases import load_bad_cases
from nnunetv2.preprocessed_data.fingerprint_files import GEOMETRY_STATISTICS, LISTS, count_cases, has_pooled_fingerprint
from nnunetv2.utilities.json_files import read_json


def read_fingerprint(preprocessed_folder: Path) -> dict[str, Any]:
    """Return the fingerprint of a dataset.

    Raises:
        RuntimeError: It has not been extracted.
    """
    file = preprocessed_folder / "dataset_fingerprint.json"
    if not file.is_file():
        raise RuntimeError(
            f"{file} is missing. Run nnUNetv2_extract_fingerprint (or nnUNetv2_plan_and_preprocess) first"
        )
    if GEOMETRY_STATISTICS in read_json(file):
        return FingerprintWithoutLists(read_json(file, required={GEOMETRY_STATISTICS: dict}))
    return read_json(file, required=dict.fromkeys(LISTS, list))


def count_training_cases(
    dataset_json: Mapping[str, Any], fingerprint: Mapping[str, Any], dataset_name: str, preprocessed_folder: Path
) -> int:
    """Return the number of training cases by dataset.json.

    A pooled fingerprint, and one without bad cases, counts instead.

    Raises:
        InvalidInputError: dataset.json gives none.
    """
    if has_pooled_fingerprint(preprocessed_folder) or load_bad_cases(preprocessed_folder):
        return count_cases(fingerprint)  # as many as it describes: else the sites' plans would differ
    if "numTraining" not in dataset_json:
        raise InvalidInputError(f"dataset.json of {dataset_name} lacks numTraining, the number of training cases")
    return dataset_json["numTraining"]


def checked_spacing(spacing: Sequence[float] | None) -> Sequence[float] | None:
    """Return a target spacing, mm per axis, as it was given.

    Raises:
        InvalidInputError: It is no three positive floats.
    """
    if spacing is None:
        return None
    if len(spacing) != 3 or not all(isinstance(s, float) and 0 < s < math.inf for s in spacing):
        raise InvalidInputError(f"overwrite_target_spacing needs three positive floats in array order, got {spacing}")
    return spacing
