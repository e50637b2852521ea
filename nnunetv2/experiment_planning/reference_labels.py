"""Keep the copies of a dataset's labels in gt_segmentations up to date.

Predictions are scored against them.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.errors import InvalidInputError
from nnunetv2.plans.partial_labels import renumber
from nnunetv2.utilities.atomic_write import copy_atomically, remove_leftovers, replacing

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

logger = logging.getLogger(__name__)


def copy_references(labels: dict[str, str], target: Path, file_ending: str, reader: BaseReaderWriter | None) -> None:
    """Copy labels, and the files beside them, that are missing or have changed.

    A copy that was edited later than its original was changed stays.

    Args:
        labels: Case -> file.
        target: Folder of the copies, CASE.ENDING.
        reader: Knows which files belong to a label. None: there are no such files.
    """
    target.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    list_side_cars: Any = getattr(
        reader, "list_side_cars", lambda label, is_label: []
    )  # readers need not be our subclasses
    replaced = []
    for case, label in labels.items():
        copies = {Path(label): target / f"{case}{file_ending}"}
        for side_car in map(Path, list_side_cars(label, is_label=True)):
            if side_car.is_file():
                copies[side_car] = target / f"{case}{side_car.name.removeprefix(_stem(label, file_ending))}"
        outdated = [(source, copy) for source, copy in copies.items() if not is_up_to_date(source, copy)]
        if any(copy.is_file() and not filecmp.cmp(source, copy, shallow=False) for source, copy in outdated):
            replaced.append(case)
        for source, copy in outdated:
            copy_atomically(source, copy, keep_time=True)
    if replaced:
        logger.warning(
            "%s: the copies of %d labels were replaced, because the labels were changed: %s%s",
            target,
            len(replaced),
            ", ".join(replaced[:10]),
            ", ..." if len(replaced) > 10 else "",
        )


def write_renumbered_references(
    labels: Mapping[str, str], target: Path, file_ending: str, reader: BaseReaderWriter, numbers: Mapping[int, int]
) -> None:
    """Write labels with other values than in their files, where missing or changed.

    Copies that were edited later than their original was changed stay.

    Args:
        labels: Case -> file.
        target: Folder of the copies, CASE.ENDING.
        numbers: Value in the files -> value in the copies.
    """
    target.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    for case, label in labels.items():
        source, copy = Path(label), target / f"{case}{file_ending}"
        mark = _time_of(source, numbers)
        if copy.is_file() and (copy.stat().st_mtime_ns == mark or _is_edited(source, copy)):
            continue
        segmentation, properties = reader.read_seg(label)
        try:
            renumbered = renumber(segmentation, numbers)
        except InvalidInputError as error:
            raise InvalidInputError(f"{label}: {error}") from error
        if copy.is_symlink():
            copy.unlink()  # its target is somebody else's
        with replacing(copy) as written:
            reader.write_seg(renumbered[0], str(written), properties)
            os.utime(written, ns=(mark, mark))


def _time_of(source: Path, numbers: Mapping[int, int]) -> int:
    """Return a time of modification that identifies a renumbered copy's original.

    It is older than any original, so no other run takes such a copy for one that was edited.
    """
    about = source.stat()
    made_from = json.dumps([about.st_size, about.st_mtime_ns, about.st_ctime_ns, sorted(numbers.items())])
    seconds = int.from_bytes(hashlib.sha256(made_from.encode()).digest()[:4], "little") >> 3  # the first 17 years
    return seconds * 10**9


def is_up_to_date(source: Path, copy: Path) -> bool:
    """Tell whether a copy equals its original, or was edited later.

    Copies have the time of modification of their original.

    Times of modification can be set by anybody: archives, rsync and restored backups bring files with older ones. The
    time of any change (ctime) cannot, except on Windows, where it is that of creation.
    """
    if not copy.is_file():
        return False
    original, copied = source.stat(), copy.stat()
    if (original.st_size, original.st_mtime_ns) == (copied.st_size, copied.st_mtime_ns):
        return original.st_ctime_ns < copied.st_ctime_ns or filecmp.cmp(source, copy, shallow=False)
    return _is_edited(source, copy)


def _is_edited(source: Path, copy: Path) -> bool:
    original, copied = source.stat(), copy.stat()
    return original.st_ctime_ns < copied.st_mtime_ns <= copied.st_ctime_ns and os.name != "nt"


def _stem(label: str, file_ending: str) -> str:
    name = Path(label).name
    return name.removesuffix(file_ending) if name.endswith(file_ending) else Path(label).stem
