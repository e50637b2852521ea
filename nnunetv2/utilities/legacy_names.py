"""Offer names of other modules under the modules that programs import them from.

Programs start as copies of the code of a module, with the imports of where they found it: `from
nnunetv2.utilities.utils import join, load_json`, or everything by a star. The modules concerned bind `__getattr__` to a
function of this module instead of importing dozens of names that they do not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module


def file_helpers_of(module_name: str) -> Callable[[str], object]:
    """Return a module `__getattr__` that looks names up in batchgenerators' file_and_folder_operations."""

    def look_up(name: str) -> object:
        if not name.startswith("__"):
            from batchgenerators.utilities import file_and_folder_operations

            if hasattr(file_and_folder_operations, name):
                return getattr(file_and_folder_operations, name)
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

    return look_up


def names_from(origins: Mapping[str, str], module_name: str) -> Callable[[str], object]:
    """Return a module `__getattr__` that looks names up where they come from.

    Nothing is stored, so that a name that a program replaces where it comes from is seen here too.

    Args:
        origins: Name -> "module" or "module:attribute". List it in the module's `__all__` too: a star import asks for
            no other names.
        module_name: `__name__` of the module.
    """

    def look_up(name: str) -> object:
        if name not in origins:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        module, _, attribute = origins[name].partition(":")
        return getattr(import_module(module), attribute) if attribute else import_module(module)

    return look_up


def origins(names_of_module: Mapping[str, str], **others: str) -> dict[str, str]:
    """Return the origin of each name.

    Args:
        names_of_module: Module -> its names, with blanks between them.
        others: Name -> "module" or "module:attribute", for modules and for names that differ from the original's.
    """
    same = {name: f"{module}:{name}" for module, names in names_of_module.items() for name in names.split()}
    return {**same, **others}
