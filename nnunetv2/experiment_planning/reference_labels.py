"""Keep the copies of a dataset's labels in gt_segmentations up to date.

Predictions are scored against them.
"""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.utilities.atomic_write import replacing

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
            with replacing(copy) as written:
                shutil.copy2(source, written)
    if replaced:
        logger.warning(
            "%s: the copies of %d labels were replaced, because the labels were changed: %s%s",
            target,
            len(replaced),
            ", ".join(replaced[:10]),
            ", ..." if len(replaced) > 10 else "",
        )


def is_up_to_date(source: Path, copy: Path) -> bool:
    """Tell whether a copy holds what its original holds, or was edited later.

    Copies are made by `shutil.copy2`.

    Times of modification can be set by anybody: archives, rsync and restored backups bring files with older ones. The
    time of any change (ctime) cannot, except on Windows, where it is that of creation.
    """
    if not copy.is_file():
        return False
    original, copied = source.stat(), copy.stat()
    if (original.st_size, original.st_mtime_ns) == (copied.st_size, copied.st_mtime_ns):
        return original.st_ctime_ns < copied.st_ctime_ns or filecmp.cmp(source, copy, shallow=False)
    is_edited = original.st_ctime_ns < copied.st_mtime_ns <= copied.st_ctime_ns
    return is_edited and os.name != "nt"


def _stem(label: str, file_ending: str) -> str:
    name = Path(label).name
    return name.removesuffix(file_ending) if name.endswith(file_ending) else Path(label).stem
