"""Whole federations as users run them: real commands, real processes, real HTTP over loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running_sites import Coordinator, start_training, train_to_the_end, wait_for_line
from small_sites import CONFIGURATION, final_weights, make_sites, plan_command, shrink_plans, train_command

from nnunetv2.federated.commands.simulate import (
    LocalSite,
    RunningProcess,
    SimulationError,
    find_command,
    run_everywhere,
    running_coordinator,
    wait_for_all,
)

RUN = f"{CONFIGURATION}.fold_0.nnUNetTrainerAsymFedAvg"


def plan(sites: list[LocalSite], folder: Path, mode: str = "ffe") -> None:
    run_everywhere(sites, lambda site: plan_command(site, mode), step="plan", log_folder=folder)
    for site in sites:
        shrink_plans(site)


def test_two_sites_train_two_rounds_and_end_with_the_same_network(tmp_path):
    sites = make_sites(tmp_path)
    options = ("--epochs", "2", "--iterations", "2", "--val-iterations", "1")
    with running_coordinator(tmp_path / "coordinator", sites, options):
        plan(sites, tmp_path / "logs")
        run_everywhere(sites, train_command, step="train", log_folder=tmp_path / "logs")
        own = [final_weights(site) for site in sites]
        run_everywhere(
            sites,
            lambda site: ["nnUNetv2_fed_fetch_model", "-o", str(tmp_path / site.name), "--install", "--replace"],
            step="fetch",
            log_folder=tmp_path / "logs",
        )
    first, second = own
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    model = tmp_path / "coordinator" / "models" / f"nnUNetTrainerAsymFedAvg__nnUNetPlans__{CONFIGURATION}"
    images = Path(sites[0].environment["nnUNet_raw"]) / f"Dataset{sites[0].dataset}_Phantom" / "imagesTs"
    run_everywhere(
        sites[:1],
        lambda _: [
            "nnUNetv2_predict_from_modelfolder",
            "-m",
            str(model),
            "-f",
            "0",
            "-i",
            str(images),
            "-o",
            str(tmp_path / "out"),
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
        ],
        step="predict",
        log_folder=tmp_path / "logs",
    )
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["phantom_005.nii.gz"]
    run_everywhere(
        sites,
        lambda site: [  # the model is installed under the name that the dataset has at the site
            "nnUNetv2_predict",
            "-d",
            f"Dataset{site.dataset}_Phantom",
            "-c",
            CONFIGURATION,
            "-f",
            "0",
            "-tr",
            "nnUNetTrainerAsymFedAvg",
            "-chk",
            "checkpoint_best.pth",
            "-i",
            str(images),
            "-o",
            str(tmp_path / site.name / "out"),
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
        ],
        step="predict_best",
        log_folder=tmp_path / "logs",
    )
    assert all((tmp_path / site.name / "out" / "phantom_005.nii.gz").is_file() for site in sites)


def test_sites_with_plans_of_their_own_share_what_matches(tmp_path):
    sites = make_sites(tmp_path)
    options = ("--epochs", "2", "--iterations", "1", "--val-iterations", "1", "--matching", "resolution")
    with running_coordinator(tmp_path / "coordinator", sites, options):
        plan(sites, tmp_path / "logs", mode="asym")
        shrink_plans(sites[1], features=4)
        edit_deepest_stage(sites[1])
        run_everywhere(sites, train_command, step="train", log_folder=tmp_path / "logs")
    first, second = (final_weights(site) for site in sites)
    name = "encoder.stages.0.0.convs.0.conv.weight"
    np.testing.assert_array_equal(first[name], second[name])
    different = [n for n in first.keys() & second.keys() if first[n].shape != second[n].shape]
    assert different, "the networks were meant to differ"


def edit_deepest_stage(site: LocalSite) -> None:
    """Give the bottleneck another width, so that the sites' networks differ there."""
    path = Path(site.environment["nnUNet_preprocessed"]) / f"Dataset{site.dataset}_Phantom" / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["features_per_stage"][-1] += 2
    path.write_text(json.dumps(plans))


def test_equal_plans_are_demanded_by_the_trainer_that_averages_whole_networks(tmp_path):
    sites = make_sites(tmp_path)
    with running_coordinator(tmp_path / "coordinator", sites, ("--epochs", "2", "--iterations", "1")):
        plan(sites, tmp_path / "logs")
        edit_deepest_stage(sites[1])
        with pytest.raises(SimulationError, match="features_per_stage"):
            run_everywhere(
                sites,
                lambda site: train_command(site, trainer="nnUNetTrainerFedAvg"),
                step="train",
                log_folder=tmp_path / "logs",
            )


def test_killed_coordinator_and_killed_site_complete_the_run(tmp_path):
    sites = make_sites(tmp_path)
    options = ["--epochs", "4", "--iterations", "2", "--val-iterations", "1"]
    folder, logs = tmp_path / "coordinator", tmp_path / "logs"
    with running_coordinator(folder, sites, options):
        plan(sites, logs)
    coordinator = Coordinator(folder, sites, options, logs)
    train_to_the_end(coordinator, sites, logs, is_killed=True, kills=1)
    first, second = (final_weights(site) for site in sites)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def test_a_site_that_joins_a_running_federation_types_the_same_commands(tmp_path):
    *sites, late = make_sites(tmp_path, num_sites=3)
    folder, logs = tmp_path / "coordinator", tmp_path / "logs"
    lines: list[str] = []
    training: list[RunningProcess] = []
    options = ("--epochs", "40", "--iterations", "1", "--val-iterations", "1")
    with running_coordinator(folder, sites, options, show=lines.append):
        plan(sites, logs)
        training += [start_training(site, logs, lines) for site in sites]
        try:
            wait_for_line(lines, r"\[north\] .*Round 1:", training)
            # A round takes milliseconds, a command a second: no round may close before the run is paused.
            os.kill(training[0].pid, signal.SIGSTOP)
            administrate(folder, "pause", RUN)
            os.kill(training[0].pid, signal.SIGCONT)
            join(late, administrate(folder, "invite", late.name))
            plan([late], logs)
            training.append(start_training(late, logs, lines))
            wait_for_line(lines, r"\[west\] .*the operator has paused the run", training)
            administrate(folder, "resume", RUN)
            wait_for_all(training)
        finally:
            for process in training:
                process.stop()
    shown = "\n".join(lines)
    assert "site west plans late" in shown and "site west has planned late" in shown
    first, *others = (final_weights(site, num_epochs=(40,)) for site in (*sites, late))
    for other in others:
        assert first.keys() == other.keys()
        for name, values in first.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def administrate(folder: Path, *words: str) -> str:
    return subprocess.run(
        [find_command("nnUNetv2_fed_admin"), "--folder", str(folder), *words],
        check=True,
        text=True,
        capture_output=True,
    ).stdout


def join(site: LocalSite, text: str) -> None:
    invitation = re.search(r"nnunet-fed:\S+", text)[0]
    subprocess.run(
        [find_command("nnUNetv2_fed_join"), invitation],
        check=True,
        capture_output=True,
        env={**os.environ, "nnUNet_fed_site": str(site.credential)},
    )
