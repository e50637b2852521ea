"""A site with several processes, several folds at a time, and a cascade: commands in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_federation import make_settings, served, validations_of, wait_until
from patience import PATIENCE_S
from site_processes import PROJECT, TRAINER, finish, fold_folder, start
from tiny_dataset import NAME, make_configuration, make_plans, make_tiny_dataset

from nnunetv2.federated.protocol import keys
from nnunetv2.plans.partial_labels import with_union
from nnunetv2.run.run_training import find_free_network_port

pytestmark = pytest.mark.slow


# Two processes whose group loses patience after 15 s; the first one has to wait for longer.
LISTENERS = """
    import os, sys, time
    from datetime import timedelta
    import torch
    from torch import distributed
    from nnunetv2.federated.errors import RefusedError
    from nnunetv2.training.nnUNetTrainer.variants.federated.rank_zero import FirstProcessError, ask_first_process
    from nnunetv2.training.nnUNetTrainer.variants.federated.network_weights import copy_from_first_process_

    def work(rank, port):
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
        distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=15))

        def slow():
            assert rank == 0
            time.sleep(20)
            return {"answer": 42}

        def refused():
            raise RefusedError("no", "Ask.", code="some_code")

        assert ask_first_process(slow, heartbeat_s=0.5) == {"answer": 42}
        try:
            ask_first_process(refused)
            raise AssertionError
        except RefusedError as error:
            assert rank == 0 and error.code == "some_code"
        except FirstProcessError as error:
            assert rank == 1 and "RefusedError: no. Ask." in str(error)
        network = torch.nn.Conv3d(3, 4, 3)
        network = network.to(memory_format=torch.channels_last_3d)
        with torch.no_grad():
            network.weight.fill_(rank + 1.0), network.bias.fill_(rank + 1.0)
        copy_from_first_process_(network)
        assert (network.weight == 1).all() and (network.bias == 1).all()
        os.write(1, f"heard by {rank}\\n".encode())  # at once, whatever the other process prints
        distributed.destroy_process_group()

    if __name__ == "__main__":
        torch.multiprocessing.spawn(work, args=(sys.argv[1],), nprocs=2)
"""


def test_the_first_process_speaks_for_all_however_long_it_takes(tmp_path):
    script = tmp_path / "listeners.py"
    script.write_text(textwrap.dedent(LISTENERS))
    done = subprocess.run(
        [sys.executable, script, str(find_free_network_port())],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["heard by 0", "heard by 1"]


# ------------------------------------------------------------------------------------------------------- real commands
@pytest.fixture
def federation(tmp_path):
    settings = make_settings(num_epochs=2, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, validate_every=1)
    with served(tmp_path / "federation", settings) as federation:
        yield federation


# Ends a process within a round of two epochs, when nothing of the third is saved or sent.
KILLED_AT_3 = f"""
import os, signal
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.variants.federated.nnUNetTrainerFedAvg import {TRAINER}

go_on = {TRAINER}.on_train_epoch_end

def end_here(trainer, outputs):
    if trainer.current_epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    go_on(trainer, outputs)

{TRAINER}.on_train_epoch_end = end_here
run_training_entry()
"""


def assert_one_network(folder: Path, configuration: str, fold: int | str) -> None:
    first, second = (
        torch.load(fold_folder(folder, site, configuration, fold) / "checkpoint_final.pth", weights_only=False)[
            "network_weights"
        ]
        for site in "AB"
    )
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


def test_a_site_with_two_processes_takes_part_like_any_other(federation, tmp_path):
    for site in "AB":
        make_tiny_dataset(tmp_path / site / "nnUNet_preprocessed", cases=5)
    finish(
        start(federation, tmp_path, "A", "3d_fullres", "0", "-num_gpus", "2"),
        start(federation, tmp_path, "B", "3d_fullres", "0"),
    )
    assert_one_network(tmp_path, "3d_fullres", 0)
    run = f"3d_fullres.fold_0.{TRAINER}"
    assert [set(record["sites"]) for record in federation.state.store.load_rounds(run)] == [{"A", "B"}] * 2
    assert [set(record["dice_of_site"]) for record in validations_of(federation.state.store, run)] == [{"A", "B"}] * 2
    (log,) = fold_folder(tmp_path, "A", "3d_fullres", 0).glob("training_log_*.txt")
    assert log.read_text().count("Round 1:") == 1


def test_a_site_with_two_processes_follows_its_federation_and_its_own_options(tmp_path):
    methods = {"proximal": 0.1, "keep_local": "head", "finetune_epochs": 1}
    settings = make_settings(num_epochs=2, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, **methods)
    with served(tmp_path / "federation", settings) as federation:
        for site in "AB":
            make_tiny_dataset(tmp_path / site / "nnUNet_preprocessed", cases=5)
        wrong = start(federation, tmp_path, "B", "3d_fullres", "0", "--epochs", "5")
        assert "--epochs 5 contradicts federation test" in wrong.communicate(timeout=PATIENCE_S)[0].splitlines()[-1]
        assert wrong.returncode == 1 and not federation.state.store.load_events("failure")
        finish(
            start(federation, tmp_path, "A", "3d_fullres", "0", "-num_gpus", "2", "--seed", "1", "--epochs", "2"),
            start(federation, tmp_path, "B", "3d_fullres", "0", "--class_weights", "core=2"),
        )
    first, second = (
        torch.load(fold_folder(tmp_path, site, "3d_fullres", 0) / "checkpoint_final.pth", weights_only=False)
        for site in "AB"
    )
    assert first["training_options"] == {"epochs": 2, "seed": 1}
    for name, values in first["network_weights"].items():
        assert torch.equal(values, second["network_weights"][name]) == (".seg_layers." not in name), name
    for site in "AB":
        tuned = torch.load(
            fold_folder(tmp_path, site, "3d_fullres", 0) / "checkpoint_finetuned.pth", weights_only=False
        )
        assert tuned["current_epoch"] == 3


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_site_that_is_killed_within_a_round_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path, monkeypatch, precision
):
    monkeypatch.setenv("nnUNet_seed", "7")
    monkeypatch.setenv("nnUNet_cpu_autocast", "0")
    settings = make_settings(
        num_epochs=5,
        exchange_every=2,
        precision=precision,
        num_iterations_per_epoch=2,
        num_val_iterations_per_epoch=1,
        validate_every=0,
    )
    ends = []
    for is_disturbed in (False, True):
        folder = tmp_path / str(is_disturbed)
        for site in "AB":
            make_tiny_dataset(folder / site / "nnUNet_preprocessed", cases=5)
        with served(folder / "federation", settings) as federation:
            others = [start(federation, folder, "B", "3d_fullres", "0")]
            if is_disturbed:
                killed = start(federation, folder, "A", "3d_fullres", "0", code=KILLED_AT_3)
                assert killed.wait(PATIENCE_S) == -signal.SIGKILL, killed.stdout.read()[-3000:]
                others.append(start(federation, folder, "A", "3d_fullres", "0", "--c"))
            else:
                others.append(start(federation, folder, "A", "3d_fullres", "0"))
            finish(*others)
        assert_one_network(folder, "3d_fullres", 0)
        path = fold_folder(folder, "A", "3d_fullres", 0) / "checkpoint_final.pth"
        ends.append(torch.load(path, weights_only=False)["network_weights"])
    assert all(torch.equal(values, ends[1][name]) for name, values in ends[0].items())


def test_a_site_that_a_scheduler_ends_says_so(federation, tmp_path):
    make_tiny_dataset(tmp_path / "A" / "nnUNet_preprocessed", cases=5)
    process = start(federation, tmp_path, "A", "3d_fullres", "0")
    registration = keys.RegistrationKey(f"3d_fullres.fold_0.{TRAINER}")
    wait_until(lambda: "A" in getattr(federation.state.registry.get(registration), "contributions", ()), 120)
    process.terminate()
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == -signal.SIGTERM, output[-3000:]
    assert [(event.site, event.detail["reason"]) for event in federation.state.store.load_events("failure")] == [
        ("A", "terminated")
    ]


def make_cascade(preprocessed: Path) -> None:
    """Write a dataset whose low and full resolution are the same, with two folds and a cascade."""
    make_tiny_dataset(preprocessed, cases=4)
    folder = preprocessed / NAME
    configurations = {
        "3d_lowres": make_configuration(data_identifier="nnUNetPlans_3d_fullres", next_stage="3d_cascade_fullres"),
        "3d_fullres": make_configuration(),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps({**make_plans(), "configurations": configurations}))
    halves = [["case_00", "case_01"], ["case_02", "case_03"]]
    (folder / "splits_final.json").write_text(
        json.dumps([{"train": halves[0], "val": halves[1]}, {"train": halves[1], "val": halves[0]}])
    )


def test_folds_run_side_by_side_and_a_cascade_goes_on_from_them(federation, tmp_path):
    for site in "AB":
        make_cascade(tmp_path / site / "nnUNet_preprocessed")
    finish(*(start(federation, tmp_path, site, "3d_lowres", fold) for site in "AB" for fold in "01"))
    for fold in (0, 1):
        assert_one_network(tmp_path, "3d_lowres", fold)
    states = {run: federation.state.registry.run_state(run).state for run in federation.state.registry.runs()}
    assert states == {f"3d_lowres.fold_{fold}.{TRAINER}": "complete" for fold in (0, 1)}
    for site in "AB":
        predicted = fold_folder(tmp_path, site, "3d_lowres", 0).parent / "predicted_next_stage" / "3d_cascade_fullres"
        assert len(list(predicted.glob("case_*"))) >= 4  # both folds together have predicted every case
    finish(*(start(federation, tmp_path, site, "3d_cascade_fullres", "0") for site in "AB"))
    assert_one_network(tmp_path, "3d_cascade_fullres", 0)
    assert json.loads((fold_folder(tmp_path, "A", "3d_cascade_fullres", 0) / "validation" / "summary.json").read_text())
    first_layer = torch.load(
        fold_folder(tmp_path, "A", "3d_cascade_fullres", 0) / "checkpoint_final.pth", weights_only=False
    )["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
    assert np.shape(first_layer)[1] == 3  # the image, and a channel for each label of the stage before
    model = federation.state.store.folder / "models" / f"{TRAINER}__nnUNetPlans__3d_cascade_fullres"
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()


UNION = {"background": 0, "blob": 1, "core": 2}


def annotate(preprocessed: Path, *classes: str) -> None:
    """Let a preprocessed dataset say that these classes are annotated only."""
    file = preprocessed / NAME / "dataset.json"
    raw = {**json.loads(file.read_text()), "labels": {name: UNION[name] for name in ("background", *classes)}}
    file.write_text(json.dumps(with_union(raw, UNION)))


def test_a_site_with_two_processes_may_annotate_fewer_classes(tmp_path):
    classes = {"A": ("blob",), "B": ("blob", "core"), "C": ("core", "blob")}
    settings = make_settings(
        num_epochs=2, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, sites=tuple(classes), labels="union"
    )
    with served(tmp_path / "federation", settings) as federation:
        for site, own in classes.items():
            make_tiny_dataset(tmp_path / site / "nnUNet_preprocessed", cases=5)
            annotate(tmp_path / site / "nnUNet_preprocessed", *own)
        finish(
            start(federation, tmp_path, "A", "3d_fullres", "0", "-num_gpus", "2"),
            *(start(federation, tmp_path, site, "3d_fullres", "0") for site in "BC"),
        )
    assert_one_network(tmp_path, "3d_fullres", 0)
    summary = json.loads((fold_folder(tmp_path, "A", "3d_fullres", 0) / "validation" / "summary.json").read_text())
    assert [*summary["mean"]] == ["1"]


def test_a_cascade_goes_on_from_all_classes(tmp_path):
    classes = {"A": ("blob",), "B": ("blob", "core"), "C": ("core", "blob")}
    settings = make_settings(
        num_epochs=1, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1, sites=tuple(classes), labels="union"
    )
    with served(tmp_path / "federation", settings) as federation:
        for site, own in classes.items():
            make_cascade(tmp_path / site / "nnUNet_preprocessed")
            annotate(tmp_path / site / "nnUNet_preprocessed", *own)
        for configuration in ("3d_lowres", "3d_cascade_fullres"):
            finish(*(start(federation, tmp_path, site, configuration, "all") for site in classes))
            assert_one_network(tmp_path, configuration, "all")
    weights = torch.load(
        fold_folder(tmp_path, "A", "3d_cascade_fullres", "all") / "checkpoint_final.pth", weights_only=False
    )["network_weights"]
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 3  # the image, and all classes of all sites
