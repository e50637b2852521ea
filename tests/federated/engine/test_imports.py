"""The engine is known to nobody who does not use it."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]

CODE = """
import ast, importlib, re, sys
from pathlib import Path
from pkgutil import walk_packages
import nnunetv2
import nnunetv2.federated.engine as engine
from nnunetv2.federated.engine.nvflare import job

for module in walk_packages(engine.__path__, f"{engine.__name__}."):
    if ".nvflare." not in module.name:
        importlib.import_module(module.name)
table = re.search(r"COMMANDS = ({.*?\\n})", Path("setup.py").read_text(), re.S)[1]
for target in ast.literal_eval(table).values():
    importlib.import_module("nnunetv2." + target.partition(":")[0])
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("nvflare", "grpc", "flask")))
"""
"""Imports what stands behind every command, and all of the engine's room that does not carry its name."""


@pytest.mark.slow
def test_no_command_and_no_module_of_ours_but_two_loads_the_engine():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
