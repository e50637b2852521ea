"""The command nnUNetv2_fed_compare with real trainings, killed and continued."""

import json
import os
import signal
import subprocess
import time

import pytest
from patience import PATIENCE_S
from small_sites import CONFIGURATION, SCANNERS

from demo.phantoms import write_dataset
from nnunetv2.comparison.command import main
from nnunetv2.federated.commands.simulate import find_command

PATCH = {"batch_size": 2, "architecture": {"arch_kwargs": {"features_per_stage": [4, 8, 16, 16, 16]}}}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments of a tiny comparison; its two sites are in nnUNet_raw."""
    raw = tmp_path / "raw"
    for number, name in enumerate(("north", "south")):
        folder = raw / f"Dataset{601 + number}_{name.capitalize()}"
        write_dataset(folder, SCANNERS[name], num_train=3, num_test=3, seed=number)
    patch = tmp_path / "patch.json"
    patch.write_text(json.dumps({"configurations": {CONFIGURATION: PATCH}}))
    for variable, value in (("nnUNet_raw", str(raw)), ("nnUNet_n_proc_DA", "0"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(variable, value)
    return [
        *("-d", "601", "602", "--arms", "alone", "ffe", "--seeds", "1", "-device", "cpu", "--plans_patch", str(patch)),
        *("--epochs", "2", "--iterations", "2", "--val_iterations", "1", "--folder", str(tmp_path / "study")),
    ]


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_reports(command, tmp_path):
    study, log = tmp_path / "study", tmp_path / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen([find_command("nnUNetv2_fed_compare"), *command], stdout=output, stderr=output)
        deadline = time.monotonic() + PATIENCE_S
        while not (study / "predicted" / "alone" / "seed_0" / "Dataset601_North").is_dir():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finished = study / "trained" / "alone" / "seed_0" / "cost.json"
    before = finished.stat().st_mtime_ns
    assert main([*command, "--c"]) == 0
    assert finished.stat().st_mtime_ns == before, "a finished step was run again"
    assert not list(study.rglob("*.unfinished")) and (study / "report.html").is_file()
    result = json.loads((study / "result.json").read_text())
    assert {(one["arm"], one["place"]) for one in result["comparisons"]} == {("ffe", "own"), ("ffe", "other")}
    models = {(one["arm"], one["model"], one["dataset"]) for one in result["scores"]}
    assert len(models) == 8 and result["costs"]["ffe"][0]["bytes"] > 1000
    ffe = result["matrix"]["ffe"]
    assert ffe["Dataset601_North"] == ffe["Dataset602_South"], "sites of one federation end with one network"
    other = tmp_path / "other"
    assert main([*command[:-1], str(other), "--known", str(study / "result.json")]) == 0
    assert not (other / "trained").exists(), "what is known was trained again"
    again = json.loads((other / "result.json").read_text())
    assert {**again, "study": {}} == {**result, "study": {}}


def test_a_dataset_that_is_missing_is_named(command, tmp_path):
    with pytest.raises(RuntimeError, match="no dataset with id 603 found"):
        main([*command[:3], "603", *command[3:]])
    assert not (tmp_path / "study").exists()
