"""Class lookup in folders of modules that other people write."""

import sys
import textwrap

import pytest

from nnunetv2.utilities.find_class_by_name import recursive_find_python_class, temporarily_extend_syspath
from nnunetv2.utilities.module_names import read_module_names


@pytest.fixture(autouse=True)
def _forget_imports():
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("alpha", "beta", "gamma", "pack"):
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def write(tmp_path):
    """Write a module below tmp_path, with the packages on the way to it."""

    def write(path: str, source: str):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(textwrap.dedent(source))
        return file

    return write


def test_class_is_found_in_a_sub_package(tmp_path, write):
    write("pack/deep/alpha.py", "class Wanted: pass")
    found = recursive_find_python_class(str(tmp_path), "Wanted", None)
    assert found.__module__ == "pack.deep.alpha"


def test_missing_class_is_none(tmp_path, write):
    write("alpha.py", "class Other: pass")
    assert recursive_find_python_class(str(tmp_path), "Wanted", None) is None


def test_plain_modules_come_before_packages_and_in_alphabetical_order(tmp_path, write):
    write("aaa_pack/alpha.py", "Wanted = 'package'")
    write("beta.py", "Wanted = 'beta'")
    write("gamma.py", "Wanted = 'gamma'")
    assert recursive_find_python_class(str(tmp_path), "Wanted", None) == "beta"


def test_only_the_module_with_the_name_is_imported(tmp_path, write):
    write("alpha.py", "import a_package_that_is_not_installed\nclass Other: pass  # not Wanted")
    write("beta.py", "class Wanted: pass")
    assert recursive_find_python_class(str(tmp_path), "Wanted", None).__name__ == "Wanted"
    assert "alpha" not in sys.modules


def test_missing_dependency_of_the_wanted_module_is_reported(tmp_path, write):
    write("alpha.py", "import a_package_that_is_not_installed\nclass Wanted: pass")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        recursive_find_python_class(str(tmp_path), "Wanted", None)


def test_syntax_error_blocks_only_its_own_names(tmp_path, write):
    write("alpha.py", "class Broken(:")
    write("beta.py", "class Wanted: pass")
    assert recursive_find_python_class(str(tmp_path), "Wanted", None) is not None
    with pytest.raises(SyntaxError):
        recursive_find_python_class(str(tmp_path), "Broken", None)


def test_imported_and_star_imported_names_count(tmp_path, write):
    write("pack/alpha.py", "class Wanted: pass")
    write("beta.py", "from pack.alpha import *")
    found = recursive_find_python_class(str(tmp_path), "Wanted", None)
    assert found is sys.modules["beta"].Wanted


def test_names_for_type_checkers_only_do_not_count(tmp_path, write):
    write("alpha.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.beta import Wanted")
    write("pack/beta.py", "class Wanted: pass")
    assert recursive_find_python_class(str(tmp_path), "Wanted", None).__module__ == "pack.beta"


def test_current_module_prefixes_the_names(tmp_path, write):
    write("pack/deep/alpha.py", "from pack.beta import Base\nclass Wanted(Base): pass")
    write("pack/beta.py", "class Base: pass")
    found = recursive_find_python_class(str(tmp_path / "pack" / "deep"), "Wanted", "pack.deep", str(tmp_path))
    assert found.__module__ == "pack.deep.alpha"


def test_search_path_is_restored(tmp_path, write):
    write("alpha.py", "class Wanted: pass")
    before = list(sys.path)
    recursive_find_python_class(str(tmp_path), "Wanted", None)
    assert sys.path == before


def test_entry_that_was_in_the_search_path_stays(tmp_path):
    sys.path.append(str(tmp_path))
    with temporarily_extend_syspath(str(tmp_path)):
        pass
    assert sys.path[-1] == str(tmp_path)


def test_cleanup_lets_two_folders_have_equal_packages(tmp_path, write):
    write("one/pack/alpha.py", "class First: pass")
    write("two/pack/alpha.py", "class Second: pass")
    for folder, name in (("one", "First"), ("two", "Second")):
        found = recursive_find_python_class(str(tmp_path / folder), name, None, cleanup_imports_from_base_folder=True)
        assert found.__name__ == name
    assert "pack" not in sys.modules


def test_changed_file_is_read_again(tmp_path, write):
    write("alpha.py", "class Other: pass")
    assert recursive_find_python_class(str(tmp_path), "Wanted", None) is None
    write("alpha.py", "class Other: pass\nclass Wanted: pass")
    assert recursive_find_python_class(str(tmp_path), "Wanted", None) is not None


def test_search_in_the_package_does_not_hide_the_library_imageio(tmp_path, write):
    from nnunetv2 import __path__ as root
    from nnunetv2.preprocessing import __path__ as folder

    recursive_find_python_class(folder[0], "NoSuchThing", "nnunetv2.preprocessing", base_folder=root[0])
    import imageio

    assert "nnunetv2" not in imageio.__file__


@pytest.mark.parametrize(
    "source",
    [
        "class A: pass",
        "def A(): pass",
        "A = 1",
        "import x as A",
        "from x import A",
        "import A.b",
        "(A, b) = 1, 2",
        "if x:\n    A = 1",
        "try:\n    from x import A\nexcept ImportError:\n    A = None",
        "with x as A: pass",
        "for A in x: pass",
        "(A := 1)",
        "def f():\n    global A\n    A = 1",
        "A: int = 1",
        "@A_\nclass A: pass",
    ],
)
def test_binding_statements(source):
    assert "A" in read_module_names(source).bound


@pytest.mark.parametrize(
    "source",
    [
        "'A'",
        "A",
        "x.A = 1",
        "def f():\n    A = 1",
        "class B:\n    A = 1",
        "[A for A in x]",
        "lambda A: 1",
        "from A import b",
    ],
)
def test_other_statements(source):
    names = read_module_names(source)
    assert "A" not in names.bound
    assert not names.is_dynamic


@pytest.mark.parametrize(
    "source",
    [
        "from x import *",
        "def __getattr__(name): pass",
        "globals()['A'] = 1",
        "if x:\n    setattr(sys.modules[__name__], 'A', 1)",
    ],
)
def test_dynamic_modules(source):
    assert read_module_names(source).is_dynamic
