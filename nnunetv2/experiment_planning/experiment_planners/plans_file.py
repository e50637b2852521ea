"""Write plans beside existing ones, and warn where they get in each other's way."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.atomic_write import save_json_atomically
from nnunetv2.utilities.json_files import PLANS, read_json

logger = logging.getLogger(__name__)

# A planner makes these or leaves them out, depending on the dataset. All others in a file were added by a person.
_OPTIONAL_CONFIGURATIONS = ("3d_lowres", "3d_fullres", "3d_cascade_fullres")
# Two configurations that agree in these make the same preprocessed files.
_DECIDES_DATA = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)


def write_plans(plans: dict[str, Any], file: Path) -> None:
    """Write plans; configurations that people have added to the file stay.

    A 3d_lowres (or 3d configuration) that an earlier planning made and this one did not would be out of date. It goes,
    unless one of the kept configurations builds on it.
    """
    plans = {**plans, "configurations": {**plans["configurations"], **_configurations_to_keep(plans, file)}}
    warn_of_shared_folders(plans, file)
    save_json_atomically(plans, file, sort_keys=False)


def _configurations_to_keep(plans: Mapping[str, Any], file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    existing = read_json(file, required=PLANS)["configurations"]
    earlier = {name: content for name, content in existing.items() if name not in plans["configurations"]}
    needed = _ancestors([name for name in earlier if name not in _OPTIONAL_CONFIGURATIONS], earlier)
    stale = [name for name in earlier if name in _OPTIONAL_CONFIGURATIONS and name not in needed]
    outdated = [name for name in earlier if name in _OPTIONAL_CONFIGURATIONS and name in needed]
    if stale:
        logger.warning(
            "%s: %s of an earlier planning removed, since the dataset as it is now needs none", file, ", ".join(stale)
        )
    if outdated:
        logger.warning(
            "%s keeps %s from an earlier planning, because a configuration of your own builds on it. The "
            "dataset as it is now needs none",
            file,
            ", ".join(outdated),
        )
    return {name: content for name, content in earlier.items() if name not in stale}


def _ancestors(names: Sequence[str], configurations: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return configurations and all those that they inherit from or start from."""
    found, pending = set(), list(names)
    while pending:
        name = pending.pop()
        if name in found or name not in configurations:
            continue
        found.add(name)
        pending += [
            configurations[name][key]
            for key in ("inherits_from", "previous_stage")
            if isinstance(configurations[name].get(key), str)
        ]
    return found


def warn_of_shared_folders(plans: Mapping[str, Any], file: Path) -> None:
    """Warn if other plans would fill the same folder of preprocessed data differently."""
    for other_file, name, other_name, differences in _find_conflicts(plans, file):
        logger.warning(
            "configuration %s of %s and %s of %s share the folder %s but differ in %s. Preprocessing one replaces the "
            "data of the other; give one a plans name and data identifier of its own.",
            name,
            file.name,
            other_name,
            other_file.name,
            plans["configurations"][name]["data_identifier"],
            ", ".join(differences),
        )


def _find_conflicts(plans: Mapping[str, Any], file: Path) -> Iterator[tuple[Path, str, str, list[str]]]:
    for other_file in sorted(file.parent.glob("*.json")):
        others = _read_plans(other_file)
        if others is None or other_file.name == file.name:
            continue
        for name, ours in plans["configurations"].items():
            for other_name, theirs in others["configurations"].items():
                if ours.get("data_identifier") != theirs.get("data_identifier") or "data_identifier" not in ours:
                    continue
                differences = [key for key in _DECIDES_DATA if _plain(ours.get(key)) != _plain(theirs.get(key))]
                if plans["transpose_forward"] != others["transpose_forward"]:
                    differences.append("transpose_forward")
                if differences:
                    yield other_file, name, other_name, differences


def _read_plans(file: Path) -> dict[str, Any] | None:
    """Return the content of a plans file, None for another kind of JSON file."""
    content = read_json(file, object)
    return content if isinstance(content, dict) and {"configurations", "transpose_forward"} <= set(content) else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
