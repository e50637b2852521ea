"""The command that runs a federation on one machine; whole ones run in the tests of the system."""

from __future__ import annotations

import contextlib
import sys
import time

import pytest
from patience import PATIENCE_S

from nnunetv2.federated.commands import coordinator, simulate
from nnunetv2.federated.errors import FederationError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", []),
        (
            "--proximal 0.01 --keep-local norm --finetune-epochs 3 --initial-weights w.pth",
            ["--proximal", "0.01", "--keep-local", "norm", "--finetune-epochs", "3", "--initial-weights", "w.pth"],
        ),
        ("--keep-local head --coordinator_options=--epochs=5", ["--keep-local", "head", "--epochs=5"]),
    ],
)
def test_methods_for_sites_that_differ_reach_the_coordinator(monkeypatch, tmp_path, words, expected):
    asked = {}
    monkeypatch.setattr(simulate, "simulate", lambda sites, **options: asked.update(options))
    assert simulate.main(["-d", "501", "502", "--folder", str(tmp_path), *words.split()]) == 0
    assert asked["coordinator_options"] == expected
    coordinator.build_parser().parse_args(asked["coordinator_options"])


def test_single_sites_have_options_of_their_own(monkeypatch, tmp_path):
    asked, commands = {}, {}

    def run_everywhere(sites, command_of, *, step, **_):
        commands[step] = {site.name: command_of(site) for site in sites}

    monkeypatch.setattr(simulate, "run_everywhere", run_everywhere)
    monkeypatch.setattr(
        simulate,
        "running_coordinator",
        lambda folder, sites, options, **_: asked.update(options=list(options)) or contextlib.nullcontext("url"),
    )
    own = ["--planning_options_of", "502=-gpu_memory_target 2", "--training_options_of", "502=-p Large"]
    words = ["-d", "501", "502", "--folder", str(tmp_path), "--networks", "own", "--planning_options=--verbose"]
    assert simulate.main([*words, *own]) == 0
    assert asked["options"] == ["--networks", "own"]
    of_501, of_502 = commands["plan"]["site501"], commands["plan"]["site502"]
    assert of_502 == [*of_501[:2], "502", *of_501[3:], "-gpu_memory_target", "2"] and of_501[-1] == "--verbose"
    assert commands["train"]["site502"][-2:] == ["-p", "Large"] and "Large" not in commands["train"]["site501"]


@pytest.mark.parametrize("status", [0, 3])
def test_sites_do_not_wait_for_a_coordinator_that_has_ended(monkeypatch, tmp_path, status):
    monkeypatch.setattr(simulate, "find_command", lambda name: sys.executable)
    coordinator = simulate.RunningProcess(
        "coordinator",
        [sys.executable, "-c", f"raise SystemExit({status})"],
        environment={},
        log_file=tmp_path / "coordinator.log",
        show=lambda line: None,
    )
    site = simulate.LocalSite(name="north", dataset="501", credential=tmp_path / "site.json", environment={})
    begun = time.monotonic()
    with pytest.raises(simulate.SimulationError, match=f"coordinator: .* ended with status {status}"):
        simulate.run_everywhere(
            [site],
            lambda site: ["waits", "-c", f"import time; time.sleep({10 * PATIENCE_S})"],
            step="train",
            log_folder=tmp_path,
            coordinator=coordinator,
        )
    assert time.monotonic() - begun < PATIENCE_S


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--planning_options_of", "503=-pl X"], "503=-pl X: expected ID=TEXT with one of the datasets 501 502"),
        (["--planning_options_of", "502"], "502: expected ID=TEXT"),
        (["--training_options_of", "502=-p X", "--training_options_of", "502=-p Y"], "is given twice for 502"),
    ],
)
def test_options_of_sites_that_there_are_not_are_named(tmp_path, words, problem):
    with pytest.raises(simulate.SimulationError, match=problem):
        simulate.main(["-d", "501", "502", "--folder", str(tmp_path), *words])


@pytest.mark.parametrize(
    "words",
    [["--training_options", "--npz 'x"], ["--training_options_of", "501=-p 'x"], ["--coordinator_options", '"']],
)
def test_a_quote_that_is_not_closed_is_named_with_its_option(tmp_path, words):
    with pytest.raises(FederationError, match=rf"{words[0]} .*: No closing quotation\. Close each quote"):
        simulate.main(["-d", "501", "502", "--folder", str(tmp_path), *words])
