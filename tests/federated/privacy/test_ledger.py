"""The ledger of what trainings have spent: what it holds after crashes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from patience import PATIENCE_S

from nnunetv2.federated.privacy import accounting, ledger
from nnunetv2.federated.privacy.ledger import Budget, BudgetError, Charge, LedgerError, charge, read_ledger, set_budget
from nnunetv2.utilities.hash_chain import START

PROJECT = Path(__file__).resolve().parents[3]
GENEROUS = Budget(epsilon=50.0, delta=1e-4)


def make_charge(epoch=0, *, sigma=20.0, steps=10, run="nnUNetTrainerDP__nnUNetPlans__2d/fold_0", **others) -> Charge:
    values = {"rate": 0.1, "clip": 1.0, "lot": 5, "patients": 50, "unit": "patient", "delta": 1e-4, **others}
    return Charge(run=run, epoch=epoch, sigma=sigma, steps=steps, **values)


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "Dataset101_Liver").mkdir()
    return tmp_path / "Dataset101_Liver" / ledger.LEDGER_FILE


@pytest.fixture
def begun(path) -> Path:
    """Return a ledger with a budget and one charge."""
    set_budget(path, GENEROUS, by="A. Weiss")
    charge(path, make_charge(), at_most=50.0)
    return path


def test_a_ledger_that_does_not_exist_is_empty(path):
    found = read_ledger(path)
    assert (found.lines, found.budget, found.head) == ((), None, START)


def test_what_was_charged_is_read_back(begun):
    found = read_ledger(begun)
    assert found.charges == (make_charge(),)
    assert found.budget == GENEROUS
    assert [line.by for line in found.lines] == ["A. Weiss", None]


def test_epochs_folds_and_restarts_add_up_as_the_library_has_it(begun):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    for epoch in (1, 2, 2):  # the last one began again after a crash
        charge(begun, make_charge(epoch), at_most=50.0)
    charge(begun, make_charge(sigma=30.0, steps=7, run="nnUNetTrainerDP__nnUNetPlans__2d/fold_1"), at_most=50.0)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma, count in ((20.0, 40), (30.0, 7)):
        event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, count)
    found = accounting.epsilon_of(read_ledger(begun).spent, 1e-4)
    assert found == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- crashes
def test_a_line_that_was_cut_off_anywhere_has_charged_nothing_and_is_replaced(begun):
    whole = begun.read_bytes()
    before = whole[: whole[:-1].rfind(b"\n") + 1]
    for length in range(len(before), len(whole)):
        begun.write_bytes(whole[:length])
        assert len(read_ledger(begun).charges) == 0
        assert len(charge(begun, make_charge(5), at_most=50.0).charges) == 1
        assert len(begun.read_bytes().splitlines()) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_ledger import make_charge
from nnunetv2.federated.privacy import ledger
where = sys.argv[2]
def die(): os.kill(os.getpid(), signal.SIGKILL)
write, sync = os.write, os.fsync
def dying_write(descriptor, content):
    if where.isdecimal():
        write(descriptor, content[: int(where)])
        die()
    return write(descriptor, content)
def dying_sync(descriptor):
    if where == "before the sync": die()
    sync(descriptor)
    if where == "after the sync": die()
os.write, os.fsync = dying_write, dying_sync
ledger.charge(Path(sys.argv[1]), make_charge(1), at_most=50.0, checked_head=sys.argv[3])
print("charged", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "counted"), [("0", 0), ("1", 0), ("200", 0), ("before the sync", 1), ("after the sync", 1)]
)
def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_ledger(begun, where, counted):
    """Whoever is told that an epoch is charged finds it in the ledger; who is not has trained nothing."""
    code = KILLED.format(paths=[str(Path(__file__).parent), str(PROJECT), str(PROJECT / "tests")])
    head = read_ledger(begun).head
    done = subprocess.run(
        [sys.executable, "-c", code, str(begun), where, head], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "charged" not in done.stdout
    assert len(read_ledger(begun).charges) == 1 + counted
    assert len(charge(begun, make_charge(1), at_most=50.0).charges) == 2 + counted


def test_a_full_disk_leaves_the_ledger_as_it_was(begun, monkeypatch):
    before, write = begun.read_bytes(), os.write

    def write_a_little(descriptor, content):
        if len(content) < 100:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:-50])

    monkeypatch.setattr(os, "write", write_a_little)
    with pytest.raises(OSError, match="No space left") as failure:
        charge(begun, make_charge(1), at_most=50.0)
    assert failure.value.filename == str(begun)
    assert begun.read_bytes() == before


def test_two_processes_take_turns(begun):
    threads = [
        threading.Thread(target=charge, args=(begun, make_charge(number)), kwargs={"at_most": 50.0})
        for number in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(one.epoch for one in read_ledger(begun).charges) == list(range(9))


# --------------------------------------------------------------------------------------------------------- tampering
def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines[1]["detail"].update(steps=1), "line 2 has been changed"),
        (lambda lines: lines.pop(0), "line 1 is missing"),
        (lambda lines: lines[1].pop("hash"), "line 2 is no line of a ledger"),
    ],
)
def test_a_ledger_that_was_changed_stops_everything(begun, change, complaint):
    lines = lines_of(begun)
    change(lines)
    write_lines(begun, lines)
    before = begun.read_bytes()
    for attempt in (lambda: read_ledger(begun), lambda: charge(begun, make_charge(1), at_most=50.0)):
        with pytest.raises(LedgerError, match=f"broken at line .: {complaint}.*restore the file"):
            attempt()
    assert begun.read_bytes() == before


def test_a_ledger_that_was_cut_off_lacks_the_head_that_was_noted(begun):
    head = read_ledger(begun).head
    write_lines(begun, lines_of(begun)[:-1])
    assert not read_ledger(begun).has_head(head)


# ----------------------------------------------------------------------------------------------------------- budgets
def test_without_a_budget_nothing_is_charged(path):
    with pytest.raises(BudgetError, match="has no privacy budget"):
        charge(path, make_charge(), at_most=50.0)


def test_a_charge_beyond_the_budget_is_not_written(begun):
    before = begun.read_bytes()
    with pytest.raises(
        BudgetError, match=r"epoch 1 of .*fold_0 would bring the patients of Dataset101_Liver to epsilon"
    ):
        charge(begun, make_charge(1, sigma=20.0, steps=10), at_most=0.01)
    assert begun.read_bytes() == before


def test_a_budget_is_lowered_to_what_is_spent_and_no_further(begun):
    spent = accounting.epsilon_of(read_ledger(begun).spent, 1e-4)
    with pytest.raises(BudgetError, match="is below what Dataset101_Liver has spent"):
        set_budget(begun, Budget(epsilon=spent * 0.99, delta=1e-4), by="B. Roux")
    lowered = set_budget(begun, Budget(epsilon=spent * 1.01, delta=1e-4), by="B. Roux")
    assert lowered.budget.epsilon == spent * 1.01
    assert [line.by for line in lowered.lines if line.kind == "budget"] == ["A. Weiss", "B. Roux"]


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-4), (float("nan"), 1e-4), (float("inf"), 1e-4), (1, 0), (1, 1)])
def test_budgets_that_mean_nothing_are_refused(path, epsilon, delta):
    with pytest.raises(ValueError, match="a budget's"):
        set_budget(path, Budget(epsilon=epsilon, delta=delta), by="A. Weiss")
    assert not path.exists()
