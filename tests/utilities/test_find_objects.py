"""Trainers by name, from the package and from folders of users."""

import os
import pickle
import subprocess
import sys
import textwrap

import pytest

from nnunetv2.utilities import find_objects
from nnunetv2.utilities.find_objects import find_in_external_folder


@pytest.fixture(autouse=True)
def _forget_imports():
    modules, path = dict(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - set(modules):
        if name.split(".")[0] in ("my_trainer", "my_layers", "pack"):
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two external folders with a package `pack` each."""
    for name in ("One", "Two"):
        package = tmp_path / name / "pack"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "helper.py").write_text(f"VALUE = {name!r}")
        (package / "trainer.py").write_text(
            textwrap.dedent(f"""
            class Trainer{name}:
                def read_helper(self):
                    from pack.helper import VALUE
                    return VALUE
            """)
        )
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path / "One"), str(tmp_path / "Two")]))
    return tmp_path / "One", tmp_path / "Two"


def test_imports_inside_methods_work_after_the_lookup(folders):
    trainer = find_in_external_folder(str(folders[0]), "TrainerOne")
    assert trainer().read_helper() == "One"


def test_external_classes_pickle_into_fresh_processes(folders):
    trainer = find_in_external_folder(str(folders[1]), "TrainerTwo")
    code = (
        f"import pickle, sys; sys.path[:] = {sys.path!r}; "
        f"print(pickle.loads({pickle.dumps(trainer())!r}).read_helper())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Two"


def test_the_folder_found_last_owns_equal_package_names(folders):
    find_in_external_folder(str(folders[0]), "TrainerOne")
    trainer = find_in_external_folder(str(folders[1]), "TrainerTwo")
    assert trainer().read_helper() == "Two"
    assert pickle.loads(pickle.dumps(trainer)) is trainer


def test_a_miss_leaves_everything_as_it_was(folders):
    first = find_in_external_folder(str(folders[0]), "TrainerOne")
    assert find_in_external_folder(str(folders[1]), "Nothing") is None
    assert first().read_helper() == "One"
    assert str(folders[1]) not in sys.path


def test_folders_are_searched_in_order(folders, caplog):
    with pytest.raises(AssertionError, match="no subclass of nnUNetTrainer"):
        find_objects.recursive_find_trainer_class_by_name("TrainerTwo")


def test_unknown_trainer_names_the_folders(folders):
    with pytest.raises(RuntimeError, match=f"nnUNetTrainerTypo.*{folders[0]}"):
        find_objects.recursive_find_trainer_class_by_name("nnUNetTrainerTypo")
