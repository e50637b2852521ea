"""Check a raw dataset, and list everything that is wrong with it at once.

Before time is spent on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.errors import InvalidDatasetError, MissingFilesError
from nnunetv2.experiment_planning.experiment_planners.splits import SPLITS_FILE
from nnunetv2.experiment_planning.integrity.cases import (
    CaseFiles,
    CaseReport,
    Expectation,
    find_label_faults,
    inspect_case,
)
from nnunetv2.experiment_planning.integrity.dataset_json import (
    check_dataset_json,
    determine_expected_labels,
    get_channel_names,
    read_dataset_json,
)
from nnunetv2.experiment_planning.integrity.files import MISSING, OTHER_NUMBER, check_files
from nnunetv2.experiment_planning.integrity.findings import Finding, count, enumerate_some, format_findings
from nnunetv2.experiment_planning.integrity.likeness import digest_test_images, find_duplicates, find_siblings
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessed_data.bad_cases import BadCase, describe_bad_cases, load_bad_cases, save_bad_cases
from nnunetv2.preprocessed_data.patients_file import load_patients
from nnunetv2.utilities.crossval_split import read_splits
from nnunetv2.utilities.plain_text import show
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

logger = logging.getLogger(__name__)

_EXAMPLES = 5  # so many first cases are tried before the choice of a reader is given up


def verify_dataset_integrity(folder: str, num_processes: int = 8) -> None:
    """Check dataset.json, the presence of all files, and the content of every case.

    The findings in all cases are printed as a table before the check fails.

    Args:
        folder: The raw dataset, with dataset.json in it.
        num_processes: How many cases are read at a time. Threads read them: image libraries decompress and convert
            outside of Python, and processes would take longer to start than most datasets to check.

    Raises:
        InvalidDatasetError: There is an error; also an AssertionError and a RuntimeError. It is a FileNotFoundError as
            well if files are missing.
    """
    inspection = inspect_dataset(Path(folder), num_processes)
    _report(inspection.name, inspection.findings, inspection.num_cases)
    num_channels = count(inspection.num_channels, "channel")
    show(
        "",
        f"{inspection.name} passed the integrity check: {count(inspection.num_cases, 'case')}, {num_channels}, labels "
        f"{enumerate_some(inspection.labels, 30)}.",
        "An image may still be wrong in ways no program sees: look at some of them.",
        "",
    )


def leave_out_bad_cases(folder: str, num_processes: int = 8) -> bool:
    """Check a dataset, and list the cases with errors in its preprocessed folder.

    All that follows does without them.

    Returns:
        Whether the list is another one than before.

    Raises:
        InvalidDatasetError: There is an error that no case alone has, or no case is left.
    """
    inspection = inspect_dataset(Path(folder), num_processes)
    bad = {finding.case for finding in inspection.findings if finding.is_error and finding.case}
    of_cases = [finding for finding in inspection.findings if finding.is_error and finding.case]
    _report(inspection.name, _without_explained(inspection, bad), inspection.num_cases)
    left = len(inspection.cases - bad)
    if not left:
        _report(inspection.name, of_cases, inspection.num_cases)
    preprocessed = Path(nnUNet_preprocessed) / inspection.name
    before = load_bad_cases(preprocessed)
    listed = {one.case: one for one in reversed(of_cases)}  # the first fault of each
    now = [BadCase(case, listed[case].file, _reason(listed[case])) for case in sorted(listed)]
    save_bad_cases(now, preprocessed)
    if now:
        title = f"{inspection.name}: {count(len(now), 'bad case')} left out, {count(left, 'case')} used"
        show("", *format_findings(title, of_cases).split("\n"), "")
        logger.warning("%s", describe_bad_cases(preprocessed))
    else:
        show(f"{inspection.name}: {count(left, 'case')} checked, none is bad and none left out.")
    return before != now


@dataclass
class Inspection:
    """The state of a raw dataset, as reading all its files has shown it."""

    name: str
    findings: list[Finding]
    cases: set[str] = field(default_factory=set)
    labels: Sequence[int] = ()
    num_channels: int = 0
    num_training: int = 0
    """Cases that dataset.json announces."""
    num_unread: int = 0
    """Cases that could have been read, had the time allowed."""

    @property
    def num_cases(self) -> int:
        return len(self.cases)


def inspect_dataset(root: Path, num_processes: int = 8, *, time_limit_s: float | None = None) -> Inspection:
    """Read a raw dataset, and return all that is wrong with it or looks so.

    Args:
        time_limit_s: Seconds after which no further case is read. None: all are.

    Raises:
        InvalidDatasetError: There is no dataset.json that can be read.
    """
    dataset_json = read_dataset_json(root)
    findings = check_dataset_json(dataset_json)
    if any(finding.is_error for finding in findings):  # cases cannot be judged by it
        return Inspection(root.name, [finding for finding in findings if finding.is_error])
    dataset = get_filenames_of_train_images_and_targets(str(root), dataset_json)
    findings += check_files(root, dataset_json, dataset)
    unfit = {finding.case for finding in findings if finding.is_error}
    cases = [
        CaseFiles(case, files["images"], files["label"], root) for case, files in dataset.items() if case not in unfit
    ]
    labels = determine_expected_labels(dataset_json)
    until = None if time_limit_s is None else time.monotonic() + time_limit_s
    inspected = _inspect_cases(cases, dataset_json, labels, num_processes, findings, until)
    num_unread = len(cases) - len(inspected)
    cases, reports = [files for files, _ in inspected], [report for _, report in inspected]
    findings += _find_unused_labels(reports, dataset_json, labels, complete=not unfit and len(reports) == len(dataset))
    findings += _find_likeness(root, dataset_json, dataset, cases, reports, num_processes if until is None else 0)
    names = set(map(str, dataset))
    channels = len(get_channel_names(dataset_json))
    return Inspection(root.name, findings, names, labels, channels, dataset_json["numTraining"], num_unread)


def _find_likeness(
    root: Path,
    dataset_json: Mapping[str, Any],
    names: Iterable[str],
    cases: Sequence[CaseFiles],
    reports: Sequence[CaseReport],
    threads: int,
) -> list[Finding]:
    """Find images that occur twice, and names like several scans of one patient.

    Args:
        names: Of all cases.
        cases: Those that were read, with their reports.
        threads: That read the images for testing; 0 leaves them out.
    """
    digests = [(files.case, *one) for files, report in zip(cases, reports) for one in report.digests.items()]
    findings: list[Finding] = []
    reader = _determine_reader(dataset_json, cases) if reports and threads else None
    if isinstance(reader, type):
        of_test, findings = digest_test_images(root, dataset_json["file_ending"], reader, threads)
        digests += of_test
    findings += find_duplicates(digests)
    preprocessed = Path(nnUNet_preprocessed) / root.name if nnUNet_preprocessed.is_set() else root
    splits = next((file for file in (preprocessed / SPLITS_FILE, root / SPLITS_FILE) if file.is_file()), None)
    return findings + find_siblings(
        root.name, list(map(str, names)), None if splits is None else read_splits(splits), load_patients(preprocessed)
    )


def _without_explained(inspection: Inspection, bad: set[str]) -> list[Finding]:
    """Return the warnings, and the errors that remain when bad cases are left out."""
    labels_alone = bad - inspection.cases  # their images are missing
    remaining = [finding for finding in inspection.findings if not (finding.is_error and finding.case)]
    if inspection.num_cases + len(labels_alone) == inspection.num_training:
        remaining = [finding for finding in remaining if finding.what != OTHER_NUMBER]
    return remaining


def _reason(finding: Finding) -> str:
    details = ", ".join(
        f"{name} {text}" for name, text in (("found", finding.found), ("expected", finding.expected)) if text
    )
    return f"{finding.what} ({details})" if details else finding.what


def verify_labels(label_file: str, readerclass: type, expected_labels: list[int]) -> bool:
    """Return whether a label holds expected values only; print the unexpected ones."""
    label, _ = readerclass().read_seg(label_file)
    faults, _ = find_label_faults(label, expected_labels)
    return _print_errors([Finding("", label_file, *fault) for fault in faults])


def check_cases(image_files: list[str], label_file: str, expected_num_channels: int, readerclass: type) -> bool:
    """Check that cases are readable, finite and fit their labels; print faults."""
    channels = [str(channel) for channel in range(expected_num_channels)]
    report = inspect_case(CaseFiles("", image_files, label_file, Path()), Expectation(readerclass, channels, None))
    return _print_errors(report.findings)


def _inspect_cases(
    cases: Sequence[CaseFiles],
    dataset_json: Mapping[str, Any],
    labels: Sequence[int],
    num_processes: int,
    findings: list[Finding],
    until: float | None = None,
) -> list[tuple[CaseFiles, CaseReport]]:
    """Read all cases, or those begun until a time; extend `findings`."""
    from tqdm import tqdm

    if not cases:
        return []
    reader = _determine_reader(dataset_json, cases)
    if isinstance(reader, Finding):
        findings.append(reader)
        return []
    ignore = labels[-1] if "ignore" in dataset_json["labels"] else None
    expected = Expectation(reader, list(get_channel_names(dataset_json).values()), labels, ignore)

    def inspect(files: CaseFiles) -> CaseReport | None:
        return None if until is not None and time.monotonic() > until else inspect_case(files, expected)

    pool = ThreadPoolExecutor(max(1, min(num_processes, len(cases))))
    try:
        done = pool.map(inspect, cases)
        shown = tqdm(done, desc="Integrity check", total=len(cases), unit="case")
        inspected = [(files, report) for files, report in zip(cases, shown) if report is not None]
    finally:
        pool.shutdown(cancel_futures=True)
    for _, report in inspected:
        findings += report.findings
    return inspected


def _determine_reader(dataset_json: Mapping[str, Any], cases: Sequence[CaseFiles]) -> type | Finding:
    """Return the reader of the first readable image, else a finding."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    failures = []
    for files in islice(cases, _EXAMPLES):
        try:
            return determine_reader_writer_from_dataset_json(dataset_json, files.images[0])
        except RuntimeError as error:
            failures.append(str(error))
    return Finding(
        cases[0].case,
        Path(cases[0].images[0]).name,
        "no reader can read the images",
        failures[0],
        "",
        "convert the images to a supported format (documentation/dataset-format.md), or name a reader in "
        "overwrite_image_reader_writer of dataset.json",
    )


def _find_unused_labels(
    reports: Sequence[CaseReport], dataset_json: Mapping[str, Any], labels: Sequence[int], complete: bool
) -> list[Finding]:
    """Find labels that no case has. Without any foreground nothing can be learned, which is an error."""
    if not reports or not complete or any(finding.is_error for report in reports for finding in report.findings):
        return []
    ignore = labels[-1] if "ignore" in dataset_json["labels"] else None
    unused = [
        label for label in labels if label not in (0, ignore) and not any(label in report.labels for report in reports)
    ]
    if not unused:
        return []
    if len(unused) == len(set(labels) - {0, ignore}):
        return [
            Finding(
                "",
                "labelsTr",
                "no case has any foreground",
                "background only",
                enumerate_some(unused, 30),
                "check that the right label files are used; there is nothing to learn from these",
            )
        ]
    return [
        Finding(
            "",
            "dataset.json",
            "labels occur in no case",
            enumerate_some(unused, 30),
            "",
            "check that the files use the labels of dataset.json; the network cannot learn these",
            is_error=False,
        )
    ]


def _report(dataset_name: str, findings: Sequence[Finding], num_cases: int | None = None) -> None:
    """Print the findings.

    Raises:
        InvalidDatasetError: There are errors.
    """
    warnings = [finding for finding in findings if not finding.is_error]
    errors = [finding for finding in findings if finding.is_error]
    if warnings:
        show("", *format_findings(f"Warnings for {dataset_name}", warnings).split("\n"))
    if not errors:
        return
    concerned = {finding.case for finding in errors if finding.case}
    of_all = f" in {len(concerned)} of {count(num_cases, 'case')}" if concerned and num_cases else ""
    show("", *format_findings(f"{dataset_name}: {count(len(errors), 'error')}{of_all}", errors).split("\n"))
    kind = MissingFilesError if any(finding.what == MISSING for finding in errors) else InvalidDatasetError
    raise kind(
        f"{dataset_name} failed the integrity check: {count(len(errors), 'error')}{of_all}, listed above. "
        f"{'The first: ' if len(errors) > 1 else ''}{errors[0]}"
    )


def _print_errors(findings: Sequence[Finding]) -> bool:
    for finding in findings:
        show(f"{'Error' if finding.is_error else 'Warning'}: {finding}")
    return not any(finding.is_error for finding in findings)
