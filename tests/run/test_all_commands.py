"""Every command of setup.py answers -h at once, and its help says something about each option."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
HEAVY = ("torch", "scipy", "skimage", "SimpleITK", "nibabel", "matplotlib", "blosc2", "batchgenerators", "sklearn")
LIMIT_S = 0.5


def read_commands() -> dict[str, str]:
    """Return the table of setup.py without running it."""
    for statement in ast.parse(SETUP.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "COMMANDS":
            return ast.literal_eval(statement.value)
    raise AssertionError("setup.py has no COMMANDS")


COMMANDS = read_commands()

# Prints the help as the console script would, then which heavy libraries are loaded.
RUN = """
import sys
from importlib import import_module
sys.argv = ["{name}", "-h"]
try:
    import_module("nnunetv2.{module}").{function}()
except SystemExit as exit:
    assert exit.code in (0, None), exit.code
print("LOADED", *(name for name in {heavy} if name in sys.modules))
"""


def cpu_seconds_of_children() -> float:
    """Return what a stopwatch would show on an idle machine, since a help waits for nothing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_comes_at_once_and_without_heavy_libraries(name):
    module, function = COMMANDS[name].split(":")
    code = RUN.format(name=name, module=module, function=function, heavy=HEAVY)
    before = cpu_seconds_of_children()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = cpu_seconds_of_children() - before
    assert done.returncode == 0, done.stderr
    help_text, loaded = done.stdout.split("LOADED")
    assert loaded.strip() == ""
    assert help_text.startswith(f"usage: {name}")
    assert seconds < LIMIT_S


def test_every_command_of_the_release_is_there():
    """The 21 of release 2.8.1, beside those of the federation."""
    expected = {
        "accumulate_crossval_results",
        "apply_postprocessing",
        "convert_MSD_dataset",
        "convert_old_nnUNet_dataset",
        "determine_postprocessing",
        "download_pretrained_model_by_url",
        "ensemble",
        "evaluate_folder",
        "evaluate_simple",
        "export_model_to_zip",
        "extract_fingerprint",
        "find_best_configuration",
        "install_pretrained_model_from_zip",
        "move_plans_between_datasets",
        "plan_and_preprocess",
        "plan_experiment",
        "plot_overlay_pngs",
        "predict",
        "predict_from_modelfolder",
        "preprocess",
        "train",
    }
    assert len(expected) == 21
    assert {f"nnUNetv2_{name}" for name in expected} <= set(COMMANDS)
