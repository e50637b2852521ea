"""The requirements of setup.py are the imports of the package."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
IMPORTED_ELSEWHERE = {"scikit-learn", "imagecodecs", "acvl-utils"}
"""By users' own code, since the release brings it along; by tifffile; by utilities/legacy_names.py, from a table."""


def declared(name: str) -> set[str]:
    """Return the names in the requirements that setup.py lists under a keyword, extras all together."""
    tree = ast.parse((PROJECT / "setup.py").read_text(encoding="utf-8"))
    value = next(node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == name)
    words = [word for node in ast.walk(value) if isinstance(node, ast.List) for word in ast.literal_eval(node)]
    return {normalised(re.match(r"[A-Za-z0-9._-]+", word)[0]) for word in words}


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported() -> set[str]:
    """Return the top packages that our modules import when they run."""
    found: set[str] = set()
    for path in (PROJECT / "nnunetv2").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if node in for_types:
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"nnunetv2"}


@pytest.mark.slow
def test_what_is_imported_is_required_and_what_is_required_is_imported():
    distributions = {module: {normalised(name) for name in names} for module, names in packages_distributions().items()}
    required, extras = declared("install_requires"), declared("extras_require")
    modules = {module for module in imported() if module in distributions}  # not extras that are not installed here
    assert {module for module in modules if not distributions[module] & (required | extras)} == set()
    provided = {name for module in modules for name in distributions[module]}
    assert required - provided == IMPORTED_ELSEWHERE
