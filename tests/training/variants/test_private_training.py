"""Whole trainings with differential privacy: account, restarts, and what tells of patients and stays out of sight."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dataset import NAME, make_dataset_json, make_plans, make_tiny_dataset

from nnunetv2.federated.privacy.accounting import epsilon_of
from nnunetv2.federated.privacy.ledger import LEDGER_FILE, Budget, BudgetError, LedgerError, read_ledger, set_budget
from nnunetv2.run.run_training import maybe_load_checkpoint, run_training
from nnunetv2.training.differential_privacy.options import PrivacyOptions
from nnunetv2.training.differential_privacy.refusals import PrivacyRefusedError
from nnunetv2.training.nnUNetTrainer.variants.privacy.nnUNetTrainerDP import nnUNetTrainerDP

CASES = 30
INTENSITIES = "foreground_intensity_properties_per_channel"
GENEROUS = Budget(epsilon=1000.0, delta=1e-3)
NOISE = {"sigma": 30.0, "uncovered": ("plans",)}
"""So much that to account for it is quick."""


class Short(nnUNetTrainerDP):
    """Two epochs of two steps."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1


@pytest.fixture
def site(roots, monkeypatch) -> Path:
    """Return the preprocessed folder of a dataset with a budget."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")
    make_tiny_dataset(roots["nnUNet_preprocessed"], cases=CASES)
    folder = roots["nnUNet_preprocessed"] / NAME
    write_splits(folder, CASES - 4)
    write_fingerprint(folder, make_plans()[INTENSITIES])
    set_budget(folder / LEDGER_FILE, GENEROUS, by="A. Weiss")
    return folder


def write_fingerprint(folder: Path, intensities: dict) -> None:
    (folder / "dataset_fingerprint.json").write_text(json.dumps({INTENSITIES: intensities}))


def write_splits(folder: Path, num_train: int) -> None:
    cases = [f"case_{number:02}" for number in range(CASES)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": cases[:num_train], "val": cases[num_train:]}]))


def make_trainer(*, trainer_class=Short, fold=0, go_on=False, **options):
    plans = {**make_plans(), "continue_training": go_on}
    trainer = trainer_class(plans, "3d_fullres", fold, make_dataset_json(), torch.device("cpu"))
    trainer.privacy_options = PrivacyOptions(**(options or NOISE))
    trainer.lines = []
    log = trainer.print_to_log_file
    trainer.print_to_log_file = lambda *words, **others: (
        trainer.lines.append(" ".join(map(str, words))),
        log(*words, **others),
    )
    if go_on:
        maybe_load_checkpoint(trainer, True, False)
    return trainer


def ledger_of(folder: Path):
    return read_ledger(folder / LEDGER_FILE)


def record_of(trainer) -> dict:
    return json.loads(Path(trainer.output_folder, "privacy.json").read_text())


@pytest.mark.slow
def test_a_training_charges_each_epoch_and_leaves_a_record(site):
    trainer = make_trainer()
    trainer.run_training()
    charges = ledger_of(site).charges
    assert [(one.epoch, one.steps, one.patients, one.lot) for one in charges] == [(0, 2, 26, 6), (1, 2, 26, 6)]
    record = record_of(trainer)
    assert record["epsilon_spent"] == epsilon_of(ledger_of(site).spent, 1e-3)
    assert record["ledger"]["head"] == ledger_of(site).head
    assert (record["unit"], record["uncovered"], record["epochs_charged"]) == ("scan", ["plans"], 2)
    assert any("each scan counts as a patient of its own" in line for line in trainer.lines)
    assert any("not covered by epsilon" in line for line in trainer.lines)


@pytest.mark.slow
def test_what_tells_of_patients_is_in_the_log_and_nowhere_else(site):
    trainer = make_trainer()
    trainer.run_training()
    folder = Path(trainer.output_folder)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    for name in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice"):
        assert np.isnan(checkpoint["logging"][name]).all() and len(checkpoint["logging"][name]) == 2
    assert np.isnan(checkpoint["logging"]["dice_per_class_or_region"]).all()
    assert not (folder / "checkpoint_best.pth").exists()
    assert not list(folder.glob("*example*")) and not list(folder.glob("*batch*"))
    losses = [float(line.split()[-1]) for line in trainer.lines if line.startswith("train_loss")]
    assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.slow
def test_patients_are_drawn_whole_and_only_from_the_training_split(site):
    cases = [f"case_{number:02}" for number in range(CASES)]
    (site / "patients.json").write_text(
        json.dumps({case: f"P{i // 2}" if i < 6 else case for i, case in enumerate(cases)})
    )
    seen = []

    class Watching(Short):
        def train_step(self, batch):
            batches = list(batch["patients"])
            seen.extend(tuple(one["keys"]) for one in batches)
            return super().train_step({"patients": iter(batches)})

    trainer = make_trainer(trainer_class=Watching, **{**NOISE, "patches": 3, "lot": 23})
    trainer.run_training()
    assert len(trainer.patients) == 23 and trainer.privacy_plan.rate == 1.0
    assert len(seen) == 4 * 23  # everybody, in each of four steps
    assert {case for keys in seen for case in keys} <= set(cases[:26])
    patient_of = json.loads((site / "patients.json").read_text())
    assert all(len(keys) == 3 and len({patient_of[key] for key in keys}) == 1 for keys in seen)
    assert record_of(trainer)["unit"] == "patient"


@pytest.mark.slow
def test_lots_without_anybody_take_steps_of_noise(site):
    class Empty(Short):
        def get_dataloaders(self):
            _, validation = super().get_dataloaders()
            return iter([{"patients": iter(())} for _ in range(4)]), validation

    trainer = make_trainer(trainer_class=Empty)
    trainer.initialize()
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.run_training()
    moved = [float((a - b.detach()).abs().max()) for a, b in zip(before, trainer.network.parameters())]
    assert min(moved) > 0
    assert len(ledger_of(site).charges) == 2


class Killed(Short):
    """The process dies in the middle of the last epoch."""

    def on_validation_epoch_start(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        super().on_validation_epoch_start()


@pytest.mark.slow
def test_an_epoch_that_is_trained_again_is_charged_again(site):
    Killed.__name__ = "Short"
    with pytest.raises(KeyboardInterrupt):
        make_trainer(trainer_class=Killed).run_training()
    trainer = make_trainer(go_on=True, lot=5)
    assert trainer.current_epoch == 1
    trainer.run_training()
    charges = ledger_of(site).charges
    assert [one.epoch for one in charges] == [0, 1, 1]
    assert [one.sigma for one in charges] == [30.0] * 3  # as the training began, though --c did not repeat it
    assert [one.lot for one in charges] == [6, 6, 5]
    assert record_of(trainer)["epsilon_spent"] == epsilon_of(ledger_of(site).spent, 1e-3)


@pytest.mark.slow
def test_what_a_crash_has_spent_is_made_up_for_by_noise(site):
    Killed.__name__ = "Short"
    tight = Budget(epsilon=1.0, delta=1e-3)
    set_budget(site / LEDGER_FILE, tight, by="A. Weiss")
    options = {"uncovered": ("plans",)}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(trainer_class=Killed, **options).run_training()
    trainer = make_trainer(go_on=True, **options)
    trainer.run_training()
    charges = ledger_of(site).charges
    assert charges[-1].sigma > charges[0].sigma
    assert epsilon_of(ledger_of(site).spent, 1e-3) <= 1.0
    make_trainer(go_on=True, **options).run_training()  # it is over already
    assert ledger_of(site).charges == charges
    assert record_of(trainer)["sigma"] == charges[-1].sigma


@pytest.mark.slow
def test_a_training_over_the_budget_trains_nothing(site):
    set_budget(site / LEDGER_FILE, Budget(epsilon=0.2, delta=1e-3), by="A. Weiss")
    with pytest.raises(BudgetError, match="3d_fullres fold 0 would bring the patients of .* choose a larger"):
        make_trainer(**{**NOISE, "sigma": 1.5}).run_training()
    assert ledger_of(site).charges == ()


@pytest.mark.slow
def test_a_charge_of_somebody_else_in_between_is_noticed(site):
    from nnunetv2.federated.privacy.ledger import charge

    trainer = make_trainer()
    trainer.initialize()
    trainer.check_privacy()
    trainer.plan_privacy()
    trainer._charge_epoch()
    (first,) = ledger_of(site).charges
    charge(site / LEDGER_FILE, first, at_most=1000.0)
    planned = sum("noise multiplier" in line for line in trainer.lines)
    trainer.current_epoch = 1
    trainer._charge_epoch()
    assert sum("noise multiplier" in line for line in trainer.lines) == planned + 1
    assert len(ledger_of(site).charges) == 3


# ------------------------------------------------------------------------------------------------------------ refused
@pytest.mark.slow
def test_a_ledger_that_lacks_charges_of_a_model_stops_everything(site):
    trainer = make_trainer()
    Path(trainer.output_folder, "privacy.json").write_text(json.dumps({"ledger": {"lines": 9, "head": "f" * 64}}))
    with pytest.raises(LedgerError, match="lacks charges that .*privacy.json tells of"):
        trainer.check_privacy()


@pytest.mark.slow
def test_few_patients_are_refused(site):
    write_splits(site, 19)
    with pytest.raises(PrivacyRefusedError, match="19 training scans"):
        make_trainer().check_privacy()


@pytest.mark.slow
def test_plans_of_the_same_patients_are_refused_unless_left_uncovered(site):
    with pytest.raises(PrivacyRefusedError, match="--dp_uncovered plans"):
        make_trainer(sigma=30.0).check_privacy()
    write_fingerprint(site, {})
    trainer = make_trainer(sigma=30.0)
    trainer.check_privacy()
    assert not trainer.are_plans_uncovered


@pytest.mark.slow
def test_units_that_do_not_add_up_are_refused(site):
    trainer = make_trainer()
    trainer.initialize()
    trainer.check_privacy()
    trainer.plan_privacy()
    trainer._charge_epoch()
    cases = [f"case_{number:02}" for number in range(CASES)]
    (site / "patients.json").write_text(json.dumps(dict.fromkeys(cases[:2], "P") | {case: case for case in cases[2:]}))
    with pytest.raises(LedgerError, match="has charged per scan, and this training would per patient"):
        make_trainer().check_privacy()
    (site / "patients.json").write_text(json.dumps({case: case for case in cases}))
    make_trainer().check_privacy()  # each patient has one scan: it is the same


@pytest.mark.slow
def test_float16_is_refused_before_anything_is_built(site):
    trainer = make_trainer()
    trainer.grad_scaler = object()
    with pytest.raises(PrivacyRefusedError, match="bfloat16 or float32"):
        trainer.initialize()


@pytest.mark.slow
def test_options_of_privacy_need_a_trainer_that_heeds_them(site):
    options = PrivacyOptions(epsilon=3.0)
    with pytest.raises(ValueError, match="nnUNetTrainer trains without differential privacy"):
        run_training(NAME, "3d_fullres", 0, "nnUNetTrainer", device=torch.device("cpu"), privacy=options)
    with pytest.raises(PrivacyRefusedError, match="DDP"):
        run_training(NAME, "3d_fullres", 0, "nnUNetTrainerDP", num_gpus=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="--val only validates"):
        run_training(
            NAME,
            "3d_fullres",
            0,
            "nnUNetTrainerDP",
            only_run_validation=True,
            device=torch.device("cpu"),
            privacy=options,
        )
