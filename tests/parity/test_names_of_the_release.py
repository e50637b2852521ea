"""Names of the release: what a star import brings, and every trainer that -tr finds."""

from __future__ import annotations

import pytest
from importable_torchvision import MAKE_IMPORTABLE

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

STAR_IMPORT = """
found = {}
exec(f"from {value} import *", found)
answer = sorted(name for name in found if not name.startswith("__"))
"""

TRAINERS = """
import importlib, inspect, pkgutil
import nnunetv2.training.nnUNetTrainer as package
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

modules = [importlib.import_module(entry.name)
           for entry in pkgutil.walk_packages(package.__path__, package.__name__ + ".") if not entry.ispkg]
answer = {name: module.__name__ for module in modules for name, kind in vars(module).items()
          if inspect.isclass(kind) and issubclass(kind, nnUNetTrainer) and kind.__module__ == module.__name__}
"""


@pytest.mark.parametrize(
    "module",
    [
        "nnunetv2.training.nnUNetTrainer.nnUNetTrainer",
        "nnunetv2.run.run_training",
        "nnunetv2.inference.predict_from_raw_data",
        "nnunetv2.training.dataloading.data_loader",
    ],
)
def test_a_star_import_brings_every_name_of_the_release(reference, roots, module):
    _, theirs = reference.run(STAR_IMPORT, module)
    names = {"value": module}
    exec(STAR_IMPORT, names)
    assert set(theirs) - set(names["answer"]) == set()


def test_every_trainer_of_the_release_is_found_in_its_module(reference, roots):
    _, theirs = reference.run(MAKE_IMPORTABLE + TRAINERS)
    assert len(theirs) == 77
    assert {name: recursive_find_trainer_class_by_name(name).__module__ for name in theirs} == theirs
