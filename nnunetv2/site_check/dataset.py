"""Read a site's cases within some time, and gather their faults by kind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nnunetv2.experiment_planning.errors import InvalidDatasetError
from nnunetv2.experiment_planning.integrity.findings import Finding as DataFault
from nnunetv2.experiment_planning.integrity.findings import count, enumerate_some
from nnunetv2.experiment_planning.verify_dataset_integrity import inspect_dataset
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.min_cases import refusal_of
from nnunetv2.preprocessed_data.bad_cases import describe_bad_cases, load_bad_cases
from nnunetv2.site_check.findings import Finding

_finding = partial(Finding, area="data")
_NAMES = {
    "damaged file": "image_unreadable",
    "a file cannot be read": "image_unreadable",
    "no reader can read the images": "image_unreadable",
    "file is missing": "file_missing",
    "a label has no image": "file_missing",
    "a channel is missing": "file_missing",
    "file is empty": "file_empty",
    "the same image occurs twice": "duplicate_image",
    "scans that look like one patient's are on both sides of a fold": "siblings_separated",
    "names look like several scans of one patient": "siblings_likely",
}
"""Fault of the integrity check -> name of the finding; kinds of mismatch are named below, the others `data_fault`."""
_SHOWN = 3


def check_data(raw: Path, preprocessed: Path, *, time_limit_s: float | None, num_threads: int) -> list[Finding]:
    """Check a raw dataset.

    Args:
        raw: Its folder.
        preprocessed: Its preprocessed folder, which may not exist yet.
        time_limit_s: Seconds after which no further case is read; None: all are.
    """
    try:
        inspection = inspect_dataset(raw, num_threads, time_limit_s=time_limit_s)
        left_out = {one.case for one in load_bad_cases(preprocessed)}
    except (InvalidDatasetError, OSError, ValueError) as error:
        remedy = "Mend dataset.json and the folders as documentation/dataset-format.md describes."
        return [_finding(name="dataset", state="problem", sentence=f"{raw.name}: {error}", remedy=remedy)]
    faults = [fault for fault in inspection.findings if not fault.case or fault.case not in left_out]
    bad = {fault.case for fault in faults if fault.is_error and fault.case}
    num_cases = inspection.num_cases - len(left_out & inspection.cases)
    findings = _gather(faults)
    read = f"{inspection.num_cases - inspection.num_unread} of {count(inspection.num_cases, 'case')} read"
    if inspection.num_unread:
        sentence = f"{raw.name}: {read} in the time of this check, {'no fault found' if not findings else 'see above'}."
        remedy = "nnUNetv2_fed_check with --all_cases reads the others too."
        findings.append(_finding(name="data_sampled", state="note", sentence=sentence, remedy=remedy))
    elif not findings:
        findings.append(_finding(name="data", state="ok", sentence=f"{raw.name}: {read}, no fault found."))
    if (line := describe_bad_cases(preprocessed)) is not None:
        findings.append(_finding(name="bad_cases_left_out", state="note", sentence=f"{line}."))
    findings.append(_check_number(raw.name, num_cases - len(bad)))
    return findings


def _check_number(name: str, num_cases: int) -> Finding:
    try:
        refusal = refusal_of(num_cases, name)
    except FederationError as error:
        remedy = "Set the variable to a whole number, or unset it."
        return _finding(name="min_cases", state="problem", sentence=f"{error}.", remedy=remedy)
    if refusal is None:
        sentence = f"{name} has {count(num_cases, 'case')} that can be used, enough to take part."
        return _finding(name="num_cases", state="ok", sentence=sentence)
    sentence, _, remedy = refusal.partition(". ")
    return _finding(name="too_few_cases", state="problem", sentence=f"{sentence}.", remedy=f"{remedy}.")


def _gather(faults: Sequence[DataFault]) -> list[Finding]:
    """Return one finding per kind of fault, with its first cases."""
    kinds: dict[tuple[str, str, bool], list[DataFault]] = {}
    for fault in faults:
        kinds.setdefault((fault.what, fault.remedy, fault.is_error), []).append(fault)
    return [
        _finding(
            name=_name_of(what),
            state="problem" if is_error else "warning",
            sentence=f"{what[:1].upper()}{what[1:]}: {enumerate_some(map(_place, of_kind), _SHOWN)}.",
            remedy=f"{remedy[:1].upper()}{remedy[1:]}."
            + (
                " Or go on without these cases: --without_bad_cases at planning."
                if is_error and of_kind[0].case
                else ""
            ),
        )
        for (what, remedy, is_error), of_kind in kinds.items()
    ]


def _name_of(what: str) -> str:
    is_mismatch = what.startswith(("label and image differ", "images of a case differ"))
    return _NAMES.get(what, "geometry_differs" if is_mismatch else "data_fault")


def _place(fault: DataFault) -> str:
    place = fault.file or fault.case
    details = " instead of ".join(part for part in (fault.found, fault.expected) if part)
    return f"{place} ({details})" if details else place
