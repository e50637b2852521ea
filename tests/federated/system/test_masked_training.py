"""Masked trainings as users run them: real commands, real processes, real networks."""

from __future__ import annotations

import numpy as np
import pytest
from small_sites import CONFIGURATION, final_weights, make_sites, plan_command, shrink_plans, train_command

from nnunetv2.federated.commands.simulate import run_everywhere, running_coordinator
from nnunetv2.federated.coordinator.storage.store import Store

RUN = f"{CONFIGURATION}.fold_0.nnUNetTrainerAsymFedAvg"
OPTIONS = ("--epochs", "2", "--iterations", "2", "--val-iterations", "1", "--validate-every", "1")


@pytest.mark.slow
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
    for site in sites:  # the keys of a run that is over are gone, and what was promised stays
        (folder,) = site.credential.parent.glob(f"{site.credential.name}.secure/*/runs/*")
        assert [path.name for path in folder.rglob("*") if path.is_file()].count("spent.jsonl") == 1
        assert not list(folder.rglob("*.pem")) and not list(folder.rglob("*.safetensors"))
