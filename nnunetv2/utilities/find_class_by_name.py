"""Find a class (or function) in a folder of Python modules by its name.

Trainers, planners, preprocessors, readers and so on are named in plans and on command lines, and users drop modules of
their own into the package folders. A module is imported only if its source can bind the wanted name, so that a lookup
takes milliseconds and a broken module in the same folder does not stand in the way.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nnunetv2.utilities.module_names import may_bind

logger = logging.getLogger(__name__)


def recursive_find_python_class(
    folder: str,
    class_name: str,
    current_module: str | None,
    base_folder: str | None = None,
    verbose: bool = False,
    cleanup_imports_from_base_folder: bool = False,
) -> object | None:
    """Return attribute `class_name` of a module in or below `folder`, or None.

    Modules of a folder come before those of its sub-packages, in alphabetical order, and any attribute counts,
    including imported ones.

    Args:
        folder: Where to search. Sub-folders are searched if they are packages.
        class_name: The attribute to look for.
        current_module: The dotted name of `folder` as a package; None if its modules are imported by their bare names.
        base_folder: The folder from which imports start, part of `sys.path` during the search. Default: `folder`.
        verbose: Log which folders are searched.
        cleanup_imports_from_base_folder: Forget the modules that the search has imported from `base_folder`, so that
            another folder may have modules of the same names.

    Raises:
        ModuleNotFoundError: A module that binds the name needs a package that is not installed.
    """
    base_folder = os.fspath(folder if base_folder is None else base_folder)
    with ExitStack() as stack:
        stack.enter_context(temporarily_extend_syspath(base_folder, at_end=_is_imported(current_module)))
        if cleanup_imports_from_base_folder:
            stack.enter_context(temporarily_cleanup_imports_from_path(base_folder))
        return _find(os.fspath(folder), class_name, current_module, verbose)


@contextmanager
def temporarily_extend_syspath(path: str, at_end: bool = False) -> Iterator[None]:
    """Put a folder into `sys.path` for a while.

    In front or behind, unless it is there already.
    """
    if path in sys.path:
        yield
        return
    sys.path.insert(len(sys.path) if at_end else 0, path)
    # Files may have been written a moment ago, after the import system has looked into the folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # another thread's search may have removed it
            sys.path.remove(path)


@contextmanager
def temporarily_cleanup_imports_from_path(path: str) -> Iterator[None]:
    """Forget, at the end, the modules below a folder that were imported meanwhile."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in modules_below(path):
            if name not in before:
                del sys.modules[name]


def modules_below(path: str) -> list[str]:
    """Return the names of all imported modules that lie in a folder or below it."""
    return [name for name, module in list(sys.modules.items()) if is_module_below(module, path)]


def is_module_below(module: object, path: str) -> bool:
    """Tell whether a module's file lies in a folder or below it.

    Or the folder of a package without one.
    """
    spec = getattr(module, "__spec__", None)
    if spec is None:
        return False
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    roots = {os.path.normpath(Path(path).absolute()), os.path.realpath(path)}
    return any(os.path.join(place, "").startswith(os.path.join(root, "")) for place in places for root in roots)


def _find(folder: str, class_name: str, current_module: str | None, verbose: bool) -> object | None:
    if verbose:
        logger.info("searching %s for %s", folder, class_name)
    entries = list(pkgutil.iter_modules([folder]))
    for entry in entries:
        if not entry.ispkg and may_bind(Path(folder, f"{entry.name}.py"), class_name):
            module = _import(_dotted(current_module, entry.name))
            if hasattr(module, class_name):
                return getattr(module, class_name)
    for entry in entries:
        if entry.ispkg:
            package = _dotted(current_module, entry.name)
            found = _find(os.path.join(folder, entry.name), class_name, package, verbose)
            if found is not None:
                return found
    return None


def _import(name: str) -> object | None:
    """Import a module; None if there is no module of this very name. A missing dependency raises."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise


def _dotted(package: str | None, name: str) -> str:
    return name if package is None else f"{package}.{name}"


def _is_imported(module: str | None) -> bool:
    """Tell whether the package of a module is imported, so that its modules are found without `sys.path`.

    Then the folder must not come first in `sys.path`: inside nnunetv2, the folder `imageio` would be mistaken for
    the library of that name.
    """
    return module is not None and module.split(".")[0] in sys.modules
