"""A federation of networks that differ, as users run it: planning under own names, training, the common models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
from small_sites import CONFIGURATION, make_sites, plan_command, train_command

from nnunetv2.federated.commands.simulate import LocalSite, run_everywhere, running_coordinator

PLANS = {"north": "nnUNetPlans", "south": "nnUNetPlans_4GB", "west": "nnUNetPlans"}
PLANNING = {"south": ["-gpu_memory_target", "4", "-overwrite_plans_name", PLANS["south"]]}
STAGES = {"north": 2, "south": 3, "west": 3}
LENGTH = ("--epochs", "2", "--iterations", "2", "--val-iterations", "1")


def plan(site: LocalSite) -> list[str]:
    return [*plan_command(site), *PLANNING.get(site.name, [])]


def give_own_network(site: LocalSite) -> None:
    """Make the network of a site's plans a small one, of its own depth: phantoms are too small for GPUs to matter."""
    path = Path(site.environment["nnUNet_preprocessed"]) / f"Dataset{site.dataset}_Phantom" / f"{PLANS[site.name]}.json"
    plans = json.loads(path.read_text())
    configuration, stages = plans["configurations"][CONFIGURATION], STAGES[site.name]
    network = configuration["architecture"]["arch_kwargs"]
    network["n_stages"] = stages
    for name in ("kernel_sizes", "strides", "n_conv_per_stage"):
        network[name] = network[name][:stages]
    network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: stages - 1]
    network["features_per_stage"] = [4, 8, 8][:stages]
    path.write_text(json.dumps(plans))


def final_weights(site: LocalSite) -> dict[str, np.ndarray]:
    import torch

    folder = Path(site.environment["nnUNet_results"]) / f"Dataset{site.dataset}_Phantom"
    path = folder / f"nnUNetTrainerAsymFedAvg__{PLANS[site.name]}__{CONFIGURATION}" / "fold_0" / "checkpoint_final.pth"
    return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=False)["network_weights"].items()}


def test_sites_plan_for_their_own_gpus_train_and_get_a_model_of_every_shared_network(tmp_path):
    sites, logs = make_sites(tmp_path), tmp_path / "logs"
    south = sites[1]
    with running_coordinator(tmp_path / "coordinator", sites, ("--networks", "own", *LENGTH)):
        run_everywhere(sites, plan, step="plan", log_folder=logs)  # under two names: both meet in one comparison
        assert "network, patch and batch are this site's own" in (logs / "south.plan.log").read_text()
        # To the others, plans of another planner are the same again.
        other = [*plan_command(south), "-pl", "nnUNetPlannerResEncM"]
        run_everywhere([south], lambda site: other, step="plan_again", log_folder=logs)
        for site in sites:
            give_own_network(site)
        run_everywhere(sites, lambda site: train_command(site, "-p", PLANS[site.name]), step="train", log_folder=logs)
        shown = (logs / "north.train.log").read_text()
        assert "The sites have 2 networks; there will be 1 common model\n" in shown
        assert "PlainConvUNet with 2 stages" in shown and "site south shares" in shown
        assert shown.index("there will be 1 common model") < shown.index("Epoch 0")
        fetch = ["nnUNetv2_fed_fetch_model", "-o", str(tmp_path / "south"), "--install"]
        run_everywhere([south], lambda site: fetch, step="fetch", log_folder=logs)
    weights = {site.name: final_weights(site) for site in sites}
    name = "decoder.seg_layers.{}.weight"
    np.testing.assert_array_equal(weights["north"][name.format(0)], weights["south"][name.format(1)])
    # South has fetched the model of north's network, under its own dataset; and predicts with what was printed.
    printed = (logs / "south.fetch.log").read_text()
    commands = re.findall(r"nnUNetv2_predict .*checkpoint_final\.pth.*", printed)
    assert len(commands) == 1 and f"-d Dataset{south.dataset}_Phantom" in commands[0], printed
    images = Path(south.environment["nnUNet_raw"]) / f"Dataset{south.dataset}_Phantom" / "imagesTs"
    words = shlex.split(commands[0].replace("IMAGES", str(images)).replace("PREDICTIONS", str(tmp_path / "predicted")))
    predict = [*words, "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"]
    run_everywhere([south], lambda site: predict, step="predict", log_folder=logs)
    assert list((tmp_path / "predicted").glob("*.nii.gz"))


def test_behind_masks_only_what_enough_sites_have_is_shared(tmp_path):
    sites, logs = make_sites(tmp_path, num_sites=3), tmp_path / "logs"
    with running_coordinator(tmp_path / "coordinator", sites, ("--networks", "own", "--secure", *LENGTH)):
        run_everywhere(sites, plan, step="plan", log_folder=logs)
        for site in sites:
            give_own_network(site)
        run_everywhere(sites, lambda site: train_command(site, "-p", PLANS[site.name]), step="train", log_folder=logs)
    shown = (logs / "south.train.log").read_text()
    assert "The sites have 2 networks; there will be 1 common model" in shown
    assert "tensors of several sites stay local: too few have them for a sum" in shown
    north, south, west = map(final_weights, sites)
    at_full_resolution, deepest = "decoder.seg_layers.{}.weight", "encoder.stages.2.0.convs.0.conv.weight"
    for other in (south, west):
        np.testing.assert_array_equal(north[at_full_resolution.format(0)], other[at_full_resolution.format(1)])
    assert not np.array_equal(south[deepest], west[deepest])
