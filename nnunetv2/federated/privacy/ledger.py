"""Keep account of the privacy spent on a dataset's patients.

    nnUNet_preprocessed/<dataset>/privacy_ledger.jsonl, a line per event:

    {"number": 1, "time": 1.7e9, "kind": "budget", "by": "A. Weiss", "detail": {"epsilon": 8.0, ...}, "hash": "..."}
    {"number": 2, "time": 1.7e9, "kind": "charge", "by": null, "detail": {"run": "...", "epoch": 0, ...}, "hash": "..."}

Lines are only appended, chained by hashes as those of the coordinator's audit log, and on the disk before the epoch
begins that they charge. An epoch that crashes is charged again. So the ledger counts too much at times, and never too
little. A line that was cut off while it was written has charged nothing: its epoch has not begun. All runs, folds and
configurations of a dataset are in one ledger, and add up, whichever patients a fold leaves out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.accounting import NoisySteps, epsilon_of
from nnunetv2.utilities.atomic_write import flush_to_disk, naming
from nnunetv2.utilities.file_lock import lock_file
from nnunetv2.utilities.hash_chain import START, chained_hash, first_break

LEDGER_FILE = "privacy_ledger.jsonl"
LOCK_PATIENCE_S = 600.0
"""How long to wait for another process that writes; accounting takes seconds."""

Unit = Literal["patient", "scan"]
Detail = TypeVar("Detail")


class LedgerError(FederationError):
    """The ledger cannot be read, or was altered."""


class BudgetError(FederationError):
    """A charge would exceed the budget, or a new budget is overspent already."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The largest cost of each patient that the site allows, of all trainings together."""

    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One epoch of one training."""

    run: str
    """Trainer, plans, configuration and fold."""
    epoch: int
    rate: float
    """Chance of each patient to be in a lot."""
    sigma: float
    """Noise multiplier."""
    steps: int
    clip: float
    lot: int
    patients: int
    """Of the training split."""
    unit: Unit
    delta: float
    """Of the budget at that time."""

    @property
    def noisy_steps(self) -> NoisySteps:
        """Return the steps for the accountant to compose."""
        return NoisySteps(self.rate, self.sigma, self.steps)


@dataclass(frozen=True)
class Line:
    """A line of the ledger."""

    number: int
    time: float
    """Seconds since 1970."""
    kind: str
    by: str | None
    """Who has set a budget."""
    detail: Budget | Charge
    hash: str


@dataclass(frozen=True)
class Ledger:
    """The content of a ledger, checked."""

    path: Path
    lines: tuple[Line, ...] = ()

    @property
    def head(self) -> str:
        """Return the hash of the last line."""
        return self.lines[-1].hash if self.lines else START

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Return all charges, in order."""
        return tuple(line.detail for line in self.lines if isinstance(line.detail, Charge))

    @property
    def budget(self) -> Budget | None:
        """Return the budget that holds, or None if none was set."""
        return next((line.detail for line in reversed(self.lines) if isinstance(line.detail, Budget)), None)

    @property
    def spent(self) -> list[NoisySteps]:
        """Return all steps that were charged."""
        return [charge.noisy_steps for charge in self.charges]

    def has_head(self, head: str) -> bool:
        """Tell whether the ledger once ended with this hash."""
        return head == START or any(line.hash == head for line in self.lines)


# --------------------------------------------------------------------------------------------------------- reading
def read_ledger(path: Path) -> Ledger:
    """Read a ledger; one that does not exist is empty.

    Raises:
        LedgerError: A line was changed, removed or inserted, or the file cannot be read.
    """
    try:
        return _parse(path, path.read_bytes())[0]
    except FileNotFoundError:
        return Ledger(path)
    except OSError as error:
        raise LedgerError(f"the privacy ledger {path} cannot be read: {error.strerror}. Nothing is trained") from error


def _parse(path: Path, content: bytes) -> tuple[Ledger, int]:
    """Return a ledger, and the bytes of its whole lines: the last one may have been cut off by a crash."""
    end = content.rfind(b"\n") + 1
    rows = []
    for number, text in enumerate(content[:end].splitlines(), start=1):
        try:
            line = json.loads(text)
            rows.append((line["number"], line["time"], line["kind"], line["by"], line["detail"], line["hash"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(path, number, f"line {number} is no line of a ledger") from error
    broken = first_break((*row[:4], json.dumps(row[4]), row[5]) for row in rows)
    if broken is not None:
        raise _broken(path, broken.number, broken.reason)
    return Ledger(path, tuple(Line(*row[:4], _detail(path, row), row[5]) for row in rows)), end


def _detail(path: Path, row: tuple[Any, ...]) -> Budget | Charge:
    kinds: dict[str, type[Budget] | type[Charge]] = {"budget": Budget, "charge": Charge}
    kind = kinds.get(row[2])
    if kind is None or not {field.name for field in fields(kind)} <= row[4].keys():
        raise _broken(path, row[0], f"line {row[0]} comes from a later version of the software")
    return kind(**{field.name: row[4][field.name] for field in fields(kind)})


def _broken(path: Path, number: int, reason: str) -> LedgerError:
    return LedgerError(
        f"the privacy ledger {path} is broken at line {number}: {reason}. Nothing is trained; restore the file from a "
        "backup that holds all its lines"
    )


# --------------------------------------------------------------------------------------------------------- writing
def set_budget(path: Path, budget: Budget, *, by: str) -> Ledger:
    """Append a budget, in somebody's name; return the ledger.

    Raises:
        BudgetError: More than that is spent.
        ValueError: Epsilon or delta make no sense.
    """
    if not 0 < budget.epsilon < float("inf"):
        raise ValueError(f"a budget's epsilon must be finite and above 0, not {budget.epsilon}")
    if not 0 < budget.delta < 1:
        raise ValueError(f"a budget's delta must be between 0 and 1, not {budget.delta}")

    def check(ledger: Ledger) -> None:
        spent = epsilon_of(ledger.spent, budget.delta)
        if spent > budget.epsilon:
            raise BudgetError(
                f"a budget of epsilon {budget.epsilon:g} (delta {budget.delta:g}) is below what {path.parent.name} has "
                f"spent, epsilon {spent:.4g}: what is spent cannot be taken back"
            )

    return _append(path, "budget", asdict(budget), by=by, check=check)


def charge(path: Path, charged: Charge, *, at_most: float, checked_head: str | None = None) -> Ledger:
    """Charge an epoch before it begins; return the ledger, which is on the disk.

    Args:
        at_most: Epsilon that patients may be brought to, by everything in the ledger together.
        checked_head: The head of the ledger for which it is known already that this charge fits.

    Raises:
        BudgetError: They would be brought to more, or there is no budget. Nothing was written.
    """

    def check(ledger: Ledger) -> None:
        budget = ledger.budget
        if budget is None:
            raise BudgetError(f"{path.parent.name} has no privacy budget")
        if ledger.head == checked_head:
            return
        limit = min(at_most, budget.epsilon)
        epsilon = epsilon_of([*ledger.spent, charged.noisy_steps], budget.delta)
        if epsilon > limit:
            raise BudgetError(
                f"epoch {charged.epoch} of {charged.run} would bring the patients of {path.parent.name} to epsilon "
                f"{epsilon:.4g} of {limit:.4g}"
            )

    return _append(path, "charge", asdict(charged), by=None, check=check)


def _append(
    path: Path, kind: str, detail: Mapping[str, Any], *, by: str | None, check: Callable[[Ledger], None]
) -> Ledger:
    """Append a line that passes a check; return the ledger with it. It is on the disk then."""
    with naming(path), _locked(path) as descriptor:
        content = _read_all(descriptor)
        ledger, end = _parse(path, content)
        check(ledger)
        row = (len(ledger.lines) + 1, time.time(), kind, by, json.dumps(detail))
        digest = chained_hash(ledger.head, row)
        line = {**dict(zip(("number", "time", "kind", "by"), row)), "detail": detail, "hash": digest}
        written = json.dumps(line).encode() + b"\n"
        if len(content) > end:
            os.ftruncate(descriptor, end)  # the rest of a line that a crash has cut off
        try:
            _write_all(descriptor, written)
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
        if not end:
            flush_to_disk(path.parent)
        return _parse(path, content[:end] + written)[0]


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open the file for appending, and keep other processes from it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except FileNotFoundError as error:
        raise LedgerError(f"there is no folder {path.parent}: preprocess the dataset first") from error
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                lock_file(descriptor)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LedgerError(f"the privacy ledger {path} has been locked for ten minutes") from None
                time.sleep(0.05)
            except OSError as error:
                raise LedgerError(
                    f"the privacy ledger {path} cannot be locked ({error.strerror}): keep nnUNet_preprocessed on a "
                    "file system with locks, or two trainings could overwrite each other's charges"
                ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    pieces = []
    while piece := os.read(descriptor, 1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
