"""Import paths that users rely on, and the picture of the rooms."""

from __future__ import annotations

import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).parents[1]
MODULES_OF_THE_RELEASE = Path(__file__).with_name("modules_of_the_release.txt").read_text(encoding="utf-8").split()


def read_table() -> dict[str, list[str]]:
    """Return the table of documented import paths: path -> modules with the code."""
    page = (PROJECT / "documentation" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| import path | the code is in |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w.]+)`", row) for row in table.splitlines()]
    return {path: new for path, *new in filter(None, rows)}


PATHS = read_table()


def read_contracts() -> dict[str, dict]:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    return {contract["id"]: contract for contract in settings["tool"]["importlinter"]["contracts"] if "id" in contract}


@pytest.mark.parametrize("path", PATHS)
def test_a_documented_import_path_leads_to_the_very_objects(path):
    old, new = import_module(path), [import_module(name) for name in PATHS[path]]
    offered = {name: value for name, value in vars(old).items() if not name.startswith("__")}
    offered.pop("file_helpers_of", None)
    assert offered
    for name, value in offered.items():
        assert any(getattr(module, name, None) is value for module in new), name


def test_the_contracts_list_the_documented_import_paths():
    contracts = read_contracts()
    assert sorted(PATHS) == sorted(contracts["pipeline-documented-paths"]["protected_modules"])
    upwards = {line.partition(" -> ")[0] for line in contracts["pipeline-layers"]["ignore_imports"]}
    assert {path for path in upwards if ".commands." not in path} < set(PATHS)


@pytest.mark.parametrize("name", MODULES_OF_THE_RELEASE)
def test_a_module_of_the_release_is_there(name):
    import_module(name)


def test_the_picture_of_the_rooms_is_current():
    pytest.importorskip("grimp")
    script = runpy.run_path(str(PROJECT / "documentation" / "draw_rooms.py"))
    current = script["draw"](script["read_panels"]())
    assert script["PICTURE"].read_text(encoding="utf-8") == current, "run python documentation/draw_rooms.py"
