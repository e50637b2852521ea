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
def test_three_sites_with_plans_of_their_own_train_behind_masks(tmp_path):
    sites = make_sites(tmp_path, num_sites=3)
    logs = tmp_path / "logs"
    with running_coordinator(tmp_path / "coordinator", sites, [*OPTIONS, "--secure", "--matching", "resolution"]):
        run_everywhere(sites, lambda site: plan_command(site, "asym"), step="plan", log_folder=logs)
        for site in sites:
            shrink_plans(site)
        run_everywhere(sites, train_command, step="train", log_folder=logs)
    first, *others = (final_weights(site) for site in sites)
    shared = [name for name in first if all(name in one and one[name].shape == first[name].shape for one in others)]
    equal = [name for name in shared if all(np.array_equal(first[name], one[name]) for one in others)]
    assert len(equal) > len(shared) / 2
    with Store(tmp_path / "coordinator") as store:
        (record, last) = store.load_rounds(RUN)
        assert set(record["pooled"]["metrics"]) == {"train_losses"}
        assert set(last["pooled"]["metrics"]) == {"train_losses", "val_losses", "mean_fg_dice"}
        assert set(last["pooled"]["earlier"]["metrics"]) == {"val_losses", "mean_fg_dice"}
        assert [one["round"] for one in store.load_validations(RUN)] == [0, 1]
    text = (logs / "site1.train.log").read_text() if (logs / "site1.train.log").exists() else ""
    assert "Traceback" not in text
