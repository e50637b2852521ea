"""The command that runs a federation on one machine; whole ones run in the tests of the system."""

from __future__ import annotations

import pytest

from nnunetv2.federated.commands import coordinator, simulate


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
