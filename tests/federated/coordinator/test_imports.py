"""The coordinator's machine needs neither torch nor what only sites need."""

import subprocess
import sys

import pytest

COMMANDS = ("admin", "api_client", "audit_log", "coordinator", "leave", "status")
CODE = f"""
import sys
from importlib import import_module
from pkgutil import walk_packages

from nnunetv2.federated import coordinator

for module in walk_packages(coordinator.__path__, f"{{coordinator.__name__}}."):
    import_module(module.name)
for name in {COMMANDS}:
    import_module(f"nnunetv2.federated.commands.{{name}}")
print(*sorted({{"requests", "SimpleITK", "tenacity", "torch"}} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_nothing_that_runs_at_the_coordinator_imports_requests_or_torch():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
