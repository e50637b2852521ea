"""Find copies of images, and scans of one patient on both sides of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nnunetv2.experiment_planning.integrity.findings import Finding, enumerate_some
from nnunetv2.experiment_planning.patient_names import Siblings, guess_siblings, suggest_rule
from nnunetv2.preprocessed_data.patients_file import find_separated
from nnunetv2.utilities.file_endings import list_names
from nnunetv2.utilities.plain_text import shell_command

DUPLICATE = "the same image occurs twice"
SEPARATED = "scans that look like one patient's are on both sides of a fold"
SIBLINGS = "names look like several scans of one patient"


def digest_voxels(image: np.ndarray) -> str | None:
    """Return a digest of an image's shape and voxels; None if all voxels are equal.

    The compression of its file makes no difference. It takes a tenth of the time that reading takes.
    """
    if not image.size or image.min() == image.max():
        return None
    digest = hashlib.blake2b(repr((image.shape, image.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def find_duplicates(digests: Iterable[tuple[str, str, str]]) -> list[Finding]:
    """Find equal images.

    Args:
        digests: Case (empty for a test image), file and digest of each image, in the order of the files.
    """
    first: dict[str, str] = {}
    findings = []
    for case, file, digest in digests:
        if digest not in first:
            first[digest] = file
            continue
        findings.append(
            Finding(
                case,
                file,
                DUPLICATE,
                f"as {first[digest]}",
                "",
                "remove one of them if they are of the same scan: a copy that is validated or tested on makes scores "
                "too good, and a copy as another channel adds nothing",
                is_error=False,
            )
        )
    return findings


def find_siblings(
    dataset: str, cases: Sequence[str], folds: Sequence[Mapping[str, Sequence[str]]] | None, patients: Mapping[str, str]
) -> list[Finding]:
    """Find scans of one patient on both sides of a fold.

    Where there are no folds yet, names that look like several scans of one patient are found.

    Args:
        dataset: Its name.
        folds: The splits, if there are any.
        patients: Case -> patient as people have said; empty where they have not, so that names are guessed by.
    """
    siblings = [] if patients else guess_siblings(cases)
    if folds is None:
        found = [(one.patient, one.cases) for one in siblings]
    else:
        guessed = {case: one.patient for one in siblings for case in one.cases}
        separated = {one.patient: (*one.train, *one.val) for one in find_separated(folds, patients or guessed)}
        found = sorted(separated.items())
    remedy = _remedy(dataset, siblings, cases, overwrite=folds is not None)
    return [
        Finding(
            patient,
            "" if folds is None else "splits_final.json",
            SIBLINGS if folds is None else SEPARATED,
            enumerate_some(of_patient, 4),
            "",
            remedy,
            is_error=False,
        )
        for patient, of_patient in found
    ]


def digest_test_images(
    folder: Path, file_ending: str, reader_class: type, num_threads: int
) -> tuple[list[tuple[str, str, str]], list[Finding]]:
    """Read the images of imagesTs.

    Returns:
        The input of `find_duplicates`, and warnings of images that cannot be read.
    """
    images = folder / "imagesTs"
    if not images.is_dir():
        return [], []
    names = [f"imagesTs/{name}" for name in list_names(images, file_ending)]

    def digest(name: str) -> str | Exception | None:
        try:
            return digest_voxels(reader_class().read_images([str(folder / name)])[0])
        except Exception as error:  # noqa: BLE001  readers raise whatever their library raises
            return error

    with ThreadPoolExecutor(max(1, min(num_threads, len(names)))) as pool:
        results = dict(zip(names, pool.map(digest, names)))
    unreadable = [
        Finding(
            "",
            name,
            "a test image cannot be read",
            " ".join(str(result).split()),
            "",
            "open the file in a viewer; replace it if it is damaged",
            is_error=False,
        )
        for name, result in results.items()
        if isinstance(result, Exception)
    ]
    return [("", name, result) for name, result in results.items() if isinstance(result, str)], unreadable


def _remedy(dataset: str, siblings: Sequence[Siblings], cases: Sequence[str], *, overwrite: bool) -> str:
    rule = suggest_rule(siblings, cases) or "TABLE.csv"
    options: list[tuple[str, str | None]] = [("-d", dataset), ("--patients", rule)]
    command = shell_command("nnUNetv2_make_splits", options=[*options, *([("--overwrite", None)] if overwrite else [])])
    return f"if they are, keep each patient on one side: {command}. Else validation scores are too good"
