"""Resolve names in plans, dataset.json and checkpoints to trusted code only.

Such files come from other people, and the things that they name are called. A name may mean

    torch modules         of torch.nn, dynamic_network_architectures and this package
    functions, classes    of torch.nn.functional, torch.nn.init and the building blocks of dynamic_network_architectures
    both                  of the modules in nnUNet_extTrainer and the packages in nnUNet_extPackages

The place of the definition counts, not that of the access: nearly every module leads to `os`. Nothing else is
imported to find that out.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from nnunetv2.utilities.external_folders import external_folders, folder_of, keep_importable
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class, temporarily_extend_syspath

if TYPE_CHECKING:
    from torch import nn

PACKAGES_VARIABLE = "nnUNet_extPackages"

_PACKAGES = ("torch.nn", "dynamic_network_architectures", "nnunetv2")
_PLAIN_FUNCTIONS = (
    "torch.nn.functional",
    "torch._C._nn",
    "torch.nn.init",
    "dynamic_network_architectures.building_blocks",
    "dynamic_network_architectures.initialization",
)
"""Where functions and classes are defined that compute and do nothing else; torch._C._nn is `gelu` and its like."""

Base = TypeVar("Base")


class UntrustedNameError(ValueError):
    """A file names something that must not be called because a file says so."""


# -------------------------------------------------------------------------------------------------- names of classes
def check_name(name: object, field: str, *, may_be_private: bool = False) -> str:
    """Return the name of a class or function that a file gives.

    Args:
        field: How error messages call the place where it stands.
        may_be_private: Whether it may begin with one underscore, as some trainers of the release do.

    Raises:
        UntrustedNameError: It is no plain, public Python name.
    """
    hidden = "__" if may_be_private else "_"
    if not isinstance(name, str) or not name.isidentifier() or name.startswith(hidden):
        raise UntrustedNameError(
            f"{field} is {_shown(name)}: expected the plain name of a class or function, without "
            "dots, slashes and leading underscores"
        )
    return name


def check_folder_name(name: str, field: str) -> str:
    """Return the name of a folder that a file gives.

    Raise UntrustedNameError if it would lead out of its place.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise UntrustedNameError(f"{field} is {_shown(name)}: expected the plain name of a folder, without slashes")
    return name


def find_class(
    name: object, *, field: str, folder: str | os.PathLike[str], package: str, base: type[Base] | tuple[type[Base], ...]
) -> type[Base] | None:
    """Return the class that a file names, from the modules of a package, or None.

    Args:
        folder: Where the package lies.
        base: A class from which it must derive, so that it is meant for the purpose; or several.

    Raises:
        UntrustedNameError: The name is none, or means something else.
    """
    found = recursive_find_python_class(os.fspath(folder), check_name(name, field), package)
    if found is not None and not (isinstance(found, type) and issubclass(found, base)):
        wanted = " or ".join(one.__name__ for one in (base if isinstance(base, tuple) else (base,)))
        raise UntrustedNameError(
            f"{field} is {name!r}, which is {_describe(found)}: expected a class that derives from {wanted}"
        )
    return found


def find_function(name: object, *, field: str, folder: str | os.PathLike[str], package: str) -> Any | None:
    """Return the function that a file names, or None.

    From the modules of a package in a folder.

    Raises:
        UntrustedNameError: The name is none, or means something that is defined elsewhere.
    """
    found = recursive_find_python_class(os.fspath(folder), check_name(name, field), package)
    if found is None or (callable(found) and _is_within(_home(found), (package,))) or _is_of_user(found):
        return found
    raise UntrustedNameError(
        f"{field} is {name!r}, which is {_describe(found)}: expected a function that a module in "
        f"{folder} defines. {_way_out(_home(found))}"
    )


# ----------------------------------------------------------------------------------------------------- dotted paths
def locate_network_class(path: str | type[nn.Module], field: str) -> type[nn.Module] | None:
    """Return the torch module class at a dotted path, None if it leads nowhere.

    A class is returned as it is.

    Raises:
        UntrustedNameError: The path leads elsewhere, or out of the trusted modules.
        ImportError: The module cannot be imported.
    """
    from torch import nn

    found = path if isinstance(path, type) else _locate(path, field)
    if found is None or (isinstance(found, type) and issubclass(found, nn.Module)):
        return found
    raise UntrustedNameError(f"the plans name {path} as {field}, which is no torch.nn.Module: {_describe(found)}")


def locate_argument(path: str, field: str) -> object | None:
    """Return the class or function that a network's argument names.

    None if that leads nowhere.

    Raises:
        UntrustedNameError: The path leads out of the trusted modules.
        ImportError: The module cannot be imported.
    """
    from torch import nn

    found = _locate(path, field)
    function = _without_arguments(found)
    is_module = isinstance(function, type) and issubclass(function, nn.Module)
    if found is None or is_module or _is_within(_home(found), _PLAIN_FUNCTIONS) or _is_of_user(found):
        return found
    raise UntrustedNameError(
        f"the plans name {path} as {field}, which is no torch.nn.Module: {_describe(found)}. {_way_out(_home(found))}"
    )


def may_be_named(path: str) -> bool:
    """Tell whether plans may name things in the package that a dotted path starts in.

    Nothing is imported.
    """
    module = path.rpartition(".")[0]
    return _is_within(module, (*_PACKAGES, *_listed_packages())) or _external_folder_of(module) is not None


def _locate(path: object, field: str) -> object | None:
    """Return the class or function at a dotted path if it is defined where things may be named."""
    module_name, name = _split(path, field)
    if not may_be_named(path):
        if not _is_installed(module_name):
            return None
        raise UntrustedNameError(
            f"the plans name {path} as {field}, which is no torch.nn.Module of a package that "
            f"they may name. {_way_out(module_name)}"
        )
    module = _import(module_name, f"the plans name {path} as {field}")
    if module is None:
        return None
    # A module's own __getattr__ may import anything; packages that the user has named may have their ways.
    found = vars(module).get(name) if _is_within(module_name, _PACKAGES) else getattr(module, name, None)
    if found is None:
        return None
    is_callable = isinstance(found, (type, FunctionType, BuiltinFunctionType, functools.partial))
    if is_callable and (_is_within(_home(found), (*_PACKAGES, *_PLAIN_FUNCTIONS)) or _is_of_user(found)):
        return found
    raise UntrustedNameError(
        f"the plans name {path} as {field}, which is no torch.nn.Module: {_describe(found)}. {_way_out(_home(found))}"
    )


def _split(path: object, field: str) -> tuple[str, str]:
    parts = path.split(".") if isinstance(path, str) else []
    if (
        len(parts) < 2
        or not all(part.isidentifier() and not part.startswith("__") for part in parts)
        or parts[-1].startswith("_")
    ):
        raise UntrustedNameError(
            f"the plans name {_shown(path)} as {field}: expected the dotted path of a class, such as torch.nn.LeakyReLU"
        )
    return ".".join(parts[:-1]), parts[-1]


def _import(name: str, why: str) -> ModuleType | None:
    """Import a module that may be named; None if there is none of this name."""
    folder = None if _is_within(name, _PACKAGES) else _external_folder_of(name)
    if folder is not None:
        keep_importable(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and _is_within(name, (error.name,)):
            return None
        raise ImportError(f"{why}, which cannot be imported: {error}") from error


# --------------------------------------------------------------------------------------------------- trusted modules
def _listed_packages() -> tuple[str, ...]:
    """Return the packages of nnUNet_extPackages."""
    return tuple(name for name in re.split(r"[,;:\s]+", os.environ.get(PACKAGES_VARIABLE, "")) if name)


def _is_installed(module: str) -> bool:
    return _top_level_spec(module) is not None


def _external_folder_of(module: str) -> str | None:
    """Return the folder of nnUNet_extTrainer that a module's top-level package stands in; None if in none.

    A library comes before a folder that has a module of its name.
    """
    if not external_folders():
        return None
    return folder_of(_top_level_spec(module))


def _top_level_spec(module: str) -> ModuleSpec | None:
    """Find a module's top-level package without importing it."""
    with ExitStack() as stack:
        for folder in external_folders():
            stack.enter_context(temporarily_extend_syspath(folder, at_end=True))
        top = module.split(".")[0]
        loaded = sys.modules.get(top)
        return (
            ModuleSpec(top, None)
            if loaded is not None and getattr(loaded, "__spec__", None) is None
            else importlib.util.find_spec(top)
        )


def _is_of_user(found: object) -> bool:
    """Tell whether a thing is defined in a package or folder that the user has named."""
    home = _home(found)
    return home is not None and (_is_within(home, _listed_packages()) or _external_folder_of(home) is not None)


def _home(found: object) -> str | None:
    """Return the module that defines a class or function."""
    found = _without_arguments(found)
    if inspect.ismodule(found):
        return found.__name__
    home = getattr(found if callable(found) else type(found), "__module__", None)
    return home if isinstance(home, str) else None


def _without_arguments(found: object) -> object:
    """Return the function of a partial one; anything else as it is."""
    while isinstance(found, functools.partial):
        found = found.func
    return found


def _is_within(module: str | None, packages: Iterable[str]) -> bool:
    return module is not None and any(module == name or module.startswith(f"{name}.") for name in packages)


# ----------------------------------------------------------------------------------------------------------- messages
def _way_out(module: str | None) -> str:
    package = (module or "").split(".")[0]
    rule = (
        "Plans may name torch modules of torch.nn, dynamic_network_architectures, nnunetv2 and the modules in "
        "nnUNet_extTrainer"
    )
    if not package or package in sys.stdlib_module_names or _is_within(package, ("torch", *_PACKAGES)):
        return rule
    return f"{rule}. If you trust that package and these plans, set {PACKAGES_VARIABLE}={package}"


def _describe(found: object) -> str:
    if inspect.ismodule(found):
        return f"the module {found.__name__}"
    found = _without_arguments(found)
    name = getattr(found, "__qualname__", None)
    if name is None:
        return f"an object of type {type(found).__name__}"
    return f"the {'class' if isinstance(found, type) else 'function'} {_home(found)}.{name}"


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:80]}..."
