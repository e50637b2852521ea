"""Noise for the epochs to come, and messages with a plan that fits."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nnunetv2.federated.privacy.accounting import NoisySteps, epsilon_of
from nnunetv2.federated.privacy.ledger import LEDGER_FILE, Budget, BudgetError, Charge, charge, read_ledger, set_budget
from nnunetv2.training.differential_privacy.options import PrivacyOptions
from nnunetv2.training.differential_privacy.plan import make_plan

DELTA = 1e-3


@pytest.fixture
def path(tmp_path):
    (tmp_path / "Dataset101_Liver").mkdir()
    return tmp_path / "Dataset101_Liver" / LEDGER_FILE


def plan(path, *, epochs=10, steps=5, num_patients=40, sigma_before=None, **options):
    return make_plan(
        PrivacyOptions(**options),
        read_ledger(path),
        num_patients=num_patients,
        epochs=epochs,
        steps=steps,
        training="3d_fullres fold 1",
        sigma_before=sigma_before,
    )


def spend(path, *, sigma=10.0, steps=20):
    charged = Charge(
        run="r",
        epoch=0,
        rate=0.25,
        sigma=sigma,
        steps=steps,
        clip=1.0,
        lot=10,
        patients=40,
        unit="patient",
        delta=DELTA,
    )
    charge(path, charged, at_most=50.0)


def test_without_a_budget_somebody_is_told_how_to_allow_one(path):
    with pytest.raises(BudgetError, match=r"nnUNetv2_fed_privacy -d Dataset101_Liver --budget 8 0.0025 --by NAME"):
        plan(path)


@pytest.mark.slow
def test_the_plan_uses_the_budget_up_and_no_more(path):
    set_budget(path, Budget(epsilon=3.0, delta=DELTA), by="A. Weiss")
    found = plan(path)
    assert (found.lot, found.rate, found.clip, found.patches) == (10, 0.25, 1.0, 1)
    assert found.epsilon == epsilon_of([NoisySteps(0.25, found.sigma, 50)], DELTA)
    assert 2.9 < epsilon_of([NoisySteps(0.25, found.sigma, 55)], DELTA) <= 3.0  # one epoch may be trained again


@pytest.mark.slow
def test_what_was_spent_before_counts(path):
    set_budget(path, Budget(epsilon=3.0, delta=DELTA), by="A. Weiss")
    before = plan(path).sigma
    spend(path)
    found = plan(path)
    assert found.sigma > before and found.epsilon <= 3.0


@pytest.mark.slow
def test_a_plan_over_the_budget_is_refused_with_plans_that_fit(path):
    set_budget(path, Budget(epsilon=2.0, delta=DELTA), by="A. Weiss")
    with pytest.raises(BudgetError) as refusal:
        plan(path, sigma=5.0, epochs=40)
    text = str(refusal.value)
    assert text.startswith("3d_fullres fold 1 would bring the patients of Dataset101_Liver to epsilon ")
    epochs = int(text.partition("train ")[2].split()[0])
    sigma = float(text.partition("--dp_sigma ")[2].partition(")")[0])
    assert 0 < epochs < 40
    assert plan(path, sigma=5.0, epochs=epochs).epsilon <= 2.0
    with pytest.raises(BudgetError):
        plan(path, sigma=5.0, epochs=epochs + 1)
    assert plan(path, sigma=sigma, epochs=40).epsilon <= 2.0
    assert "raise the budget" in text


def test_nothing_is_left_after_everything_was_spent(path):
    set_budget(path, Budget(epsilon=50.0, delta=DELTA), by="A. Weiss")
    spend(path)
    set_budget(path, Budget(epsilon=epsilon_of(read_ledger(path).spent, DELTA), delta=DELTA), by="A. Weiss")
    with pytest.raises(BudgetError, match="nothing is left for 3d_fullres fold 1"):
        plan(path)


@pytest.mark.slow
def test_a_training_does_not_go_on_with_noise_that_would_ruin_it(path):
    set_budget(path, Budget(epsilon=50.0, delta=DELTA), by="A. Weiss")
    spend(path)
    spent = epsilon_of(read_ledger(path).spent, DELTA)
    set_budget(path, Budget(epsilon=1.02 * spent, delta=DELTA), by="A. Weiss")
    with pytest.raises(BudgetError, match=r"use the model as it is \(-chk checkpoint_latest.pth\)"):
        plan(path, sigma_before=10.0, epochs=5)
    with pytest.raises(BudgetError, match="nothing is left"):
        plan(path)  # nor does another one begin
    assert plan(path, sigma_before=60.0, epochs=1).epsilon <= 1.02 * spent


def test_a_training_that_is_over_needs_nothing_more(path):
    set_budget(path, Budget(epsilon=50.0, delta=DELTA), by="A. Weiss")
    spend(path)
    spent = epsilon_of(read_ledger(path).spent, DELTA)
    set_budget(path, Budget(epsilon=spent, delta=DELTA), by="A. Weiss")
    over = plan(path, epochs=0, sigma_before=10.0)
    assert (over.epsilon, over.sigma) == (spent, 10.0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"epsilon": 9.0}, "--dp_epsilon 9 is more than the budget of Dataset101_Liver, epsilon 3"),
        ({"lot": 41}, "--dp_lot 41 is more than the 40 patients"),
        ({"num_patients": 2000}, "delta of 0.001 would allow to publish one of 2000 patients: choose 5e-05 or less"),
    ],
)
def test_what_cannot_be_is_refused(path, options, complaint):
    set_budget(path, Budget(epsilon=3.0, delta=DELTA), by="A. Weiss")
    with pytest.raises(ValueError if "epsilon" not in options else BudgetError, match=complaint):
        plan(path, **options)


@pytest.mark.parametrize("name", ["epsilon", "sigma", "lot", "clip", "patches"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_options_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"--dp_{name} must be finite and above 0"):
        PrivacyOptions(**{name: value})


def test_a_continued_training_keeps_what_is_not_asked_for_again():
    began = PrivacyOptions(epsilon=3.0, sigma=5.0, lot=8, uncovered=("plans",))
    began = PrivacyOptions.of_json(json.loads(json.dumps(dataclasses.asdict(began))))
    assert PrivacyOptions().otherwise(began) == began
    assert PrivacyOptions(lot=4).otherwise(began) == dataclasses.replace(began, lot=4)
    assert PrivacyOptions(epsilon=4.0).otherwise(began).sigma is None  # noise for another epsilon is found anew
