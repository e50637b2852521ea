"""Show the privacy that trainings have spent on patients, and set the budget.

The account of a dataset is a file of this site (`privacy/ledger.py`); nothing is sent.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.federated.errors import FederationError
from nnunetv2.utilities.plain_text import printable, printable_json, show

if TYPE_CHECKING:
    from nnunetv2.federated.privacy.ledger import Charge, Ledger


def describe(ledger: Ledger) -> Iterator[str]:
    """Yield the lines that people read."""
    from nnunetv2.utilities.durations import format_moment

    charges, name = ledger.charges, ledger.path.parent.name
    units = sorted({charge.unit for charge in charges})
    per = " or ".join(units) or "patient"
    yield f"{name}: {ledger.path}"
    for line in ledger.lines:
        if line.kind == "budget":
            budget: Any = line.detail
            yield (
                f"  {format_moment(line.time)}: {printable(line.by or 'nobody')} allows epsilon {budget.epsilon:g}, "
                f"delta {budget.delta:g}"
            )
    if ledger.budget is None:
        yield "  no budget yet: no training with differential privacy begins (--budget EPSILON DELTA --by NAME)"
    for run, epochs in _by_run(charges).items():
        yield f"  {printable(run)}: {_describe_run(epochs)}"
    if ledger.budget is None and charges:
        yield f"  spent: {sum(charge.steps for charge in charges)} steps; epsilon needs a delta, which a budget has"
    elif ledger.budget is not None:
        budget = ledger.budget
        spent = _spent(ledger)
        assert spent is not None
        yield (
            f"  spent by all of them together: epsilon {spent:.4g} of {budget.epsilon:g} per {per}, delta "
            f"{budget.delta:g}"
        )
    if units == ["scan"]:
        yield "  There was no patients.json: who has several scans is protected less than epsilon says"
    yield f"  {len(ledger.lines)} lines, head to be noted elsewhere: {ledger.head}"


def as_json(ledger: Ledger) -> dict[str, Any]:
    """Return the account for programs."""
    from dataclasses import asdict

    return {
        "dataset": ledger.path.parent.name,
        "budget": None if ledger.budget is None else asdict(ledger.budget),
        "epsilon": _spent(ledger),
        "lines": [asdict(line) for line in ledger.lines],
        "head": ledger.head,
    }


def _spent(ledger: Ledger) -> float | None:
    from nnunetv2.federated.privacy.accounting import epsilon_of

    return None if ledger.budget is None else epsilon_of(ledger.spent, ledger.budget.delta)


def _by_run(charges: Sequence[Charge]) -> dict[str, list[Charge]]:
    runs: dict[str, list[Charge]] = {}
    for charge in charges:
        runs.setdefault(charge.run, []).append(charge)
    return runs


def _describe_run(charges: Sequence[Charge]) -> str:
    again = len(charges) - len({charge.epoch for charge in charges})
    sigmas = sorted({charge.sigma for charge in charges})
    noise = f"{sigmas[0]:.4g}" if len(sigmas) == 1 else f"{sigmas[0]:.4g} to {sigmas[-1]:.4g}"
    last = charges[-1]
    return (
        f"{len(charges)} epochs charged{f', {again} of them again' if again else ''}, "
        f"{sum(charge.steps for charge in charges)} steps of {last.lot} of {last.patients} {last.unit}s, noise "
        f"multiplier {noise}"
    )


# ---------------------------------------------------------------------------------------------------- command line
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `nnUNetv2_fed_privacy`."""
    parser = argparse.ArgumentParser(
        description="Show what trainings with differential privacy have spent on the patients of a dataset, and set "
        "how much they may spend. Nothing is sent."
    )
    parser.add_argument("-d", dest="dataset", required=True, metavar="ID", help="dataset: its name or id")
    parser.add_argument(
        "--budget",
        nargs=2,
        type=float,
        metavar=("EPSILON", "DELTA"),
        help="allow all trainings of the dataset together to bring each patient to this epsilon, for example 8 0.0001. "
        "A new budget takes the place of the one before; it cannot be below what is spent",
    )
    parser.add_argument(
        "--by", metavar="NAME", help="who sets the budget; needed with --budget, and kept in the ledger"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    parser.add_argument(
        "--head", metavar="HASH", help="a head that was noted earlier: finds out whether the ledger was cut off since"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `nnUNetv2_fed_privacy`."""
    arguments = build_parser().parse_args(argv)
    from nnunetv2.federated.privacy.ledger import LEDGER_FILE, Budget, LedgerError, read_ledger, set_budget
    from nnunetv2.paths import nnUNet_preprocessed
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    name = maybe_convert_to_dataset_name(arguments.dataset)
    folder = Path(nnUNet_preprocessed) / name
    if not folder.is_dir():
        raise FederationError(f"there is no folder {folder}: preprocess the dataset first")
    path = folder / LEDGER_FILE
    if arguments.budget is not None:
        by = (arguments.by or "").strip()
        if not by:
            raise FederationError("a budget is set in somebody's name: add --by NAME")
        epsilon, delta = arguments.budget
        set_budget(path, Budget(epsilon=epsilon, delta=delta), by=by)
    elif arguments.by:
        raise FederationError("--by says who sets a budget: add --budget EPSILON DELTA")
    ledger = read_ledger(path)
    if arguments.head and not any(line.hash.startswith(arguments.head.strip().lower()) for line in ledger.lines):
        raise LedgerError(
            f"no line of {path} has the head {arguments.head}: the ledger was cut off before it, or written anew"
        )
    show(*([printable_json(as_json(ledger), indent=4)] if arguments.json else describe(ledger)))
    return 0


def privacy_entry() -> None:
    """Entry point of the console script `nnUNetv2_fed_privacy`."""
    from nnunetv2.utilities.command_line import run_command

    run_command(main)
