"""The help of a command answers at once."""

import subprocess
import sys

import pytest

COMMANDS = (
    "admin",
    "coordinator",
    "engine",
    "fetch_model",
    "join",
    "leave",
    "manifest",
    "roster",
    "simulate",
    "status",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_at_once_without_torch(name):
    code = (
        f"import sys; from nnunetv2.federated.commands.{name} import main\n"
        "try:\n    main(['-h'])\nfinally:\n"
        "    late = {'torch', 'requests', 'pydantic', 'numpy', 'SimpleITK', 'scipy'} & set(sys.modules)\n"
        "    assert not late, late"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
