"""Write the curves of a training as text: `progress.csv` for spreadsheets and `progress.json` for programs.

Both hold every curve, also those that users add. In the CSV a row is an epoch, and a curve with several values per
epoch has a column for each: `dice_per_class_or_region/class_1`. In the JSON a curve is a list with an entry per epoch.
A value that is not a finite number is an empty cell, or null.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.atomic_write import replacing

Curves = Mapping[str, Sequence]
CSV_FILE, JSON_FILE = "progress.csv", "progress.json"


def split_entries(name: str, value: Any) -> dict[str, Any]:
    """Return the curves of a value: one, or one per entry of a list.

    Those are `<name>/class_1` and so on.
    """
    if not isinstance(value, list):
        return {name: value}
    return {f"{name}/class_{number}": entry for number, entry in enumerate(value, start=1)}


def encode_csv(curves: Curves) -> str:
    """Return the curves as CSV; short ones end with empty cells."""
    rows: list[dict[str, Any]] = [{} for _ in range(max(map(len, curves.values()), default=0))]
    for name, values in curves.items():
        for row, value in zip(rows, values):
            row.update(split_entries(name, _plain(value)))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["epoch", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"epoch": epoch, **row} for epoch, row in enumerate(rows))
    return text.getvalue()


def encode_json(curves: Curves) -> str:
    """Return the text of the JSON."""
    return json.dumps({name: [_plain(value) for value in values] for name, values in curves.items()}, allow_nan=False)


def write_csv(curves: Curves, folder: Path) -> None:
    """Write `progress.csv` into a folder."""
    _write(folder / CSV_FILE, encode_csv(curves))


def write_json(curves: Curves, folder: Path) -> None:
    """Write `progress.json` into a folder."""
    _write(folder / JSON_FILE, encode_json(curves))


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Return a value with Python's own types: numbers, text, lists and None; anything else as text."""
    if hasattr(value, "tolist"):  # of NumPy and torch
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)
