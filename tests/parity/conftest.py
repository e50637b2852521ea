"""Run the reference release of nnU-Net as a black box in a virtual environment of its own.

`make reference` creates the environment; FEDNNUNET_REFERENCE names another one (a folder with `bin/python`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parents[2]
# More threads than free cores wait for each other most of the time, and two files of tests run side by side.
THREADS = "1"

# Arrays and a JSON value go in and come out through files, so that neither side imports the other.
PROLOGUE = """
import json, os, sys
import numpy as np
inputs = dict(np.load(sys.argv[1], allow_pickle=False))
value = json.loads(open(sys.argv[2]).read())
outputs, answer = {}, None
"""
EPILOGUE = """
np.savez(sys.argv[3], **outputs)
open(sys.argv[4], "w").write(json.dumps(answer))
"""


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.parity)


@dataclass(frozen=True)
class PythonElsewhere:
    """A Python interpreter in which code runs in a fresh process, isolated from this one."""

    python: Path
    folder: Path
    environment: dict[str, str]

    def run(self, code: str, value: object = None, timeout_s: float = 900, **arrays: np.ndarray):
        """Run `code`, which reads `inputs` (arrays) and `value` (JSON) and fills `outputs` and `answer`.

        Returns:
            The dict `outputs` and the JSON value `answer`.
        """
        number = len(list(self.folder.glob("call_*.py")))
        paths = [self.folder / f"call_{number}{ending}" for ending in (".py", ".in.npz", ".in.json", ".npz", ".json")]
        script, arrays_in, value_in, arrays_out, value_out = paths
        # Spawned workers import the script anew, hence the guard.
        indented = "".join(f"    {line}\n" for line in (PROLOGUE + code + EPILOGUE).splitlines())
        script.write_text(f"if __name__ == '__main__':\n{indented}")
        np.savez(arrays_in, **arrays)
        value_in.write_text(json.dumps(value))
        self.command(self.python, script, arrays_in, value_in, arrays_out, value_out, timeout_s=timeout_s)
        with np.load(arrays_out, allow_pickle=False) as loaded:
            return dict(loaded), json.loads(value_out.read_text())

    def command(self, *arguments: object, timeout_s: float = 900) -> str:
        """Run a command of this environment (a console script by its name) and return what it printed."""
        program, *rest = [str(argument) for argument in arguments]
        if not Path(program).is_absolute():
            program = str(self.python.parent / program)
        environment = {**os.environ, **self.environment}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [program, *rest],
            env=environment,
            cwd=self.folder,
            timeout=timeout_s,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{Path(program).name} ended with {done.returncode}:\n{done.stdout[-6000:]}")
        return done.stdout


@pytest.fixture
def reference(tmp_path) -> PythonElsewhere:
    """The reference release; nnUNet_* variables set by the test are passed on."""
    home = Path(os.environ.get("FEDNNUNET_REFERENCE", PROJECT / ".venv-reference"))
    python = home / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no reference environment in {home}; create it with `make reference`")
    folder = tmp_path / "reference_calls"
    folder.mkdir()
    return PythonElsewhere(python, folder, {"OMP_NUM_THREADS": THREADS, "nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"})


@pytest.fixture
def ours(tmp_path) -> PythonElsewhere:
    """This package in a fresh process, for comparisons of whole commands."""
    folder = tmp_path / "our_calls"
    folder.mkdir()
    environment = {"OMP_NUM_THREADS": THREADS, "nnUNet_n_proc_DA": "0", "nnUNet_cpu_autocast": "0"}
    return PythonElsewhere(Path(sys.executable), folder, environment)
