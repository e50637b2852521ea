"""Masked trainings as users run them: real commands, real processes, real networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_sites import CONFIGURATION, final_weights, make_sites, plan_command, shrink_plans, train_command

from nnunetv2.federated.commands.simulate import run_everywhere, running_coordinator
from nnunetv2.federated.coordinator.storage.store import Store
from nnunetv2.federated.privacy.ledger import LEDGER_FILE, read_ledger

PRIVATE = "nnUNetTrainerDPAsymFedAvg"
RUN = f"{CONFIGURATION}.fold_0.nnUNetTrainerAsymFedAvg"
OPTIONS = ("--epochs", "2", "--iterations", "2", "--val-iterations", "1", "--validate-every", "1")


def test_three_sites_plan_and_train_behind_masks(tmp_path):
    sites = make_sites(tmp_path, num_sites=3)
    logs = tmp_path / "logs"
    with running_coordinator(tmp_path / "coordinator", sites, [*OPTIONS, "--secure"]):
        run_everywhere(sites, plan_command, step="plan", log_folder=logs)
        for site in sites:
            shrink_plans(site)
        run_everywhere(sites, train_command, step="train", log_folder=logs)
    first, *others = (final_weights(site) for site in sites)
    for name, values in first.items():
        assert all(np.array_equal(values, one[name]) for one in others), name
    with Store(tmp_path / "coordinator") as store:
        (record, last) = store.load_rounds(RUN)
        assert set(record["pooled"]["metrics"]) == {"train_losses"}
        assert set(last["pooled"]["metrics"]) == {"train_losses", "val_losses", "mean_fg_dice"}
        assert set(last["pooled"]["earlier"]["metrics"]) == {"val_losses", "mean_fg_dice"}
        assert [one["round"] for one in store.load_validations(RUN)] == [0, 1]
    assert (tmp_path / "coordinator" / "models" / f"nnUNetTrainerAsymFedAvg__nnUNetPlans__{CONFIGURATION}").is_dir()
    assert_keys_are_gone(sites)


def assert_keys_are_gone(sites):
    """What opens the masks of a run that is over is deleted, and what was promised stays."""
    for site in sites:
        (folder,) = site.credential.parent.glob(f"{site.credential.name}.secure/*/runs/*")
        assert [path.name for path in folder.rglob("*") if path.is_file()].count("spent.jsonl") == 1
        assert not list(folder.rglob("*.pem")) and not list(folder.rglob("*.safetensors"))


def test_rounds_of_several_epochs_half_precision_proximal_terms_and_closing_epochs_go_along_with_masks(tmp_path):
    sites = make_sites(tmp_path, num_sites=3)
    logs = tmp_path / "logs"
    options = ["--epochs", "3", "--iterations", "1", "--val-iterations", "1", "--validate-every", "1", "--secure"]
    options += ["--exchange-every", "2", "--precision", "float16", "--proximal", "0.1"]
    with running_coordinator(tmp_path / "coordinator", sites, [*options, "--finetune-epochs", "1"]):
        run_everywhere(sites, plan_command, step="plan", log_folder=logs)
        for site in sites:
            shrink_plans(site)
        run_everywhere(sites, train_command, step="train", log_folder=logs)
    weights = [final_weights(site, num_epochs=(3, 4)) for site in sites]
    assert all(np.isfinite(values).all() for one in weights for values in one.values())
    with Store(tmp_path / "coordinator") as store:
        assert [len(record["sites"]) for record in store.load_rounds(RUN)] == [3, 3]
        assert [one["round"] for one in store.load_validations(RUN)] == [0, 1]
    assert_keys_are_gone(sites)


def test_three_sites_train_with_differential_privacy_behind_masks(tmp_path):
    """Masks hide the update of a site, noise the patients: losses, Dice and counts leave in no form."""
    sites = make_sites(tmp_path, num_sites=3, num_train=25, num_test=0)  # 20 are trained on: the fewest
    logs = tmp_path / "logs"
    privacy = ("--dp_sigma", "2", "--dp_lot", "4", "--dp_uncovered", "plans")
    with running_coordinator(tmp_path / "coordinator", sites, [*OPTIONS, "--secure"]):
        run_everywhere(sites, plan_command, step="plan", log_folder=logs)
        for site in sites:
            shrink_plans(site)
        run_everywhere(sites, budget_command, step="budget", log_folder=logs)
        run_everywhere(
            sites, lambda site: train_command(site, *privacy, trainer=PRIVATE), step="train", log_folder=logs
        )
    first, *others = (final_weights(site, PRIVATE) for site in sites)
    for name, values in first.items():
        assert all(np.array_equal(values, one[name]) for one in others), name
    with Store(tmp_path / "coordinator") as store:
        run = f"{CONFIGURATION}.fold_0.{PRIVATE}"
        records = store.load_rounds(run)
        assert [record["round"] for record in records] == [0, 1]
        for record in records:
            assert record["pooled"]["metrics"] == {} and record["pooled"]["earlier"] is None
            declared = [held["declared_privacy"] for held in record["sites"].values()]
            assert [(one["unit"], one["epsilon"], one["uncovered"]) for one in declared] == [
                ("scan", 50.0, ["plans"])
            ] * 3
        assert store.load_validations(run) == []
    for site in sites:
        ledger = read_ledger(next(Path(site.environment["nnUNet_preprocessed"]).glob(f"*/{LEDGER_FILE}")))
        assert [one.epoch for one in ledger.charges] == [0, 1]
    assert_keys_are_gone(sites)


def budget_command(site):
    return ["nnUNetv2_fed_privacy", "-d", site.dataset, "--budget", "50", "0.001", "--by", "A. Weiss"]
