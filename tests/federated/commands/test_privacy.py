"""The command that shows what is spent of the patients' privacy, and sets the budget."""

from __future__ import annotations

import json

import pytest

from nnunetv2.federated.commands.privacy import main
from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.privacy.accounting import epsilon_of
from nnunetv2.federated.privacy.ledger import LEDGER_FILE, BudgetError, Charge, LedgerError, charge, read_ledger

NAME = "Dataset101_Liver"
BUDGET = ["--budget", "8", "0.0001", "--by", "A. Weiss"]


@pytest.fixture
def path(roots):
    folder = roots["nnUNet_preprocessed"] / NAME
    folder.mkdir()
    return folder / LEDGER_FILE


def spend(path, epoch=0, **others):
    values = {"rate": 0.1, "sigma": 20.0, "steps": 10, "clip": 1.0, "lot": 5, "patients": 50, "unit": "patient"}
    charged = Charge(run="nnUNetTrainerDP__nnUNetPlans__2d/fold_0", epoch=epoch, delta=1e-4, **{**values, **others})
    charge(path, charged, at_most=50.0)


def show(capsys, *arguments) -> str:
    assert main(["-d", "101", *arguments]) == 0
    return capsys.readouterr().out


def test_without_a_budget_it_says_how_to_set_one(path, capsys):
    text = show(capsys)
    assert "no budget yet" in text and "--budget EPSILON DELTA --by NAME" in text
    assert not path.exists()  # looking writes nothing


def test_it_shows_what_is_spent_of_how_much_and_by_whom_that_is_allowed(path, capsys):
    show(capsys, *BUDGET)
    for epoch in (0, 1, 1):
        spend(path, epoch)
    text = show(capsys)
    spent = epsilon_of(read_ledger(path).spent, 1e-4)
    assert "A. Weiss allows epsilon 8, delta 0.0001" in text
    assert "fold_0: 3 epochs charged, 1 of them again, 30 steps of 5 of 50 patients, noise multiplier 20" in text
    assert f"spent by all of them together: epsilon {spent:.4g} of 8 per patient" in text
    assert read_ledger(path).head in text


def test_scans_are_not_called_patients(path, capsys):
    show(capsys, *BUDGET)
    spend(path, unit="scan")
    text = show(capsys)
    assert "50 scans" in text and "per scan" in text and "no patients.json" in text


def test_programs_get_json(path, capsys):
    show(capsys, *BUDGET)
    spend(path)
    content = json.loads(show(capsys, "--json"))
    assert content["budget"] == {"epsilon": 8.0, "delta": 0.0001}
    assert content["epsilon"] == epsilon_of(read_ledger(path).spent, 1e-4)
    assert [line["kind"] for line in content["lines"]] == ["budget", "charge"]


def test_a_budget_needs_a_name(path):
    for name in ([], ["--by", "  "]):
        with pytest.raises(FederationError, match="set in somebody's name: add --by NAME"):
            main(["-d", "101", "--budget", "8", "0.0001", *name])
    with pytest.raises(FederationError, match="add --budget"):
        main(["-d", "101", "--by", "A. Weiss"])


def test_a_budget_below_what_is_spent_is_refused(path):
    main(["-d", "101", *BUDGET])
    spend(path)
    with pytest.raises(BudgetError, match="what is spent cannot be taken back"):
        main(["-d", "101", "--budget", "0.001", "0.0001", "--by", "B. Roux"])
    main(["-d", "101", "--budget", "9", "0.0001", "--by", "B. Roux"])
    assert [line.by for line in read_ledger(path).lines] == ["A. Weiss", None, "B. Roux"]


def test_a_head_that_was_noted_finds_out_what_was_cut_off(path, capsys):
    show(capsys, *BUDGET)
    spend(path)
    head = read_ledger(path).head
    show(capsys, "--head", head[:16])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerError, match="the ledger was cut off before it"):
        main(["-d", "101", "--head", head])


def test_a_dataset_that_is_not_preprocessed_is_named(roots):
    (roots["nnUNet_raw"] / NAME).mkdir()
    with pytest.raises(FederationError, match="preprocess the dataset first"):
        main(["-d", "101"])
