"""Find trainer classes by name, in the package and in the folders of nnUNet_extTrainer."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys

from nnunetv2.paths import nnUNet_extTrainer
from nnunetv2.utilities.external_folders import external_folders, keep_importable
from nnunetv2.utilities.find_class_by_name import is_module_below, modules_below, recursive_find_python_class
from nnunetv2.utilities.plug_in_kinds import TRAINER
from nnunetv2.utilities.trusted_names import check_name

logger = logging.getLogger(__name__)


def recursive_find_trainer_class_by_name(trainer_name: str) -> type:
    """Return the trainer class of this name.

    From the package, else from the first external folder that has it.

    The modules of an external trainer stay imported and its folder stays at the end of `sys.path`, so that imports
    inside its methods work and worker processes can unpickle it.

    Raises:
        RuntimeError: There is no such class.
        AssertionError: It is no subclass of nnUNetTrainer.
        UntrustedNameError: The name is none that a class can have.
    """
    check_name(trainer_name, "the trainer's name", may_be_private=True)
    package_folder = _package_folder()
    internal_folder = os.path.join(package_folder, "training", "nnUNetTrainer")
    trainer_class = recursive_find_python_class(
        internal_folder, trainer_name, "nnunetv2.training.nnUNetTrainer", base_folder=package_folder
    )
    if trainer_class is None:
        trainer_class = _find_in_external_folders(trainer_name)
    if trainer_class is None:
        raise RuntimeError(
            f"no trainer named {trainer_name!r} found, neither in {internal_folder} nor in the folders "
            f"of the environment variable nnUNet_extTrainer ({nnUNet_extTrainer.get()}). Check the "
            "spelling, or add a module with this class to one of these folders"
        )
    _require_trainer(trainer_class, trainer_name)
    return trainer_class


def _find_in_external_folders(trainer_name: str) -> object | None:
    for folder in external_folders():
        logger.info("looking for trainer %s in external folder %s", trainer_name, folder)
        trainer_class = find_in_external_folder(folder, trainer_name)
        if trainer_class is not None:
            return trainer_class
    return None


def find_in_external_folder(folder: str, class_name: str) -> object | None:
    """Return attribute `class_name` of an external folder's module, or None.

    Several external folders may have modules of the same names: the one found last keeps them, because it is the one
    in use. Without a hit, everything is as it was before.
    """
    before = dict(sys.modules)
    namesakes = _modules_hiding(folder)
    for name in namesakes:
        del sys.modules[name]
    found = None
    try:
        found = recursive_find_python_class(folder, class_name, None, base_folder=folder, verbose=True)
    finally:
        if found is None:
            for name in modules_below(folder):
                if sys.modules[name] is not before.get(name):
                    del sys.modules[name]
            sys.modules.update({name: before[name] for name in namesakes})
    if found is not None:
        keep_importable(folder)
    return found


def _modules_hiding(folder: str) -> list[str]:
    """Return the imported modules of other external folders that have the top-level name of one in `folder`.

    Libraries are not among them: a folder with a file `torch.py` must not take torch away.
    """
    offered = {entry.name for entry in pkgutil.iter_modules([folder])}
    others = [other for other in external_folders() if other != folder]
    return [
        name
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in offered
        and any(is_module_below(module, other) for other in others)
        and not is_module_below(module, folder)
    ]


def _package_folder() -> str:
    return importlib.import_module("nnunetv2").__path__[0]


def _require_trainer(trainer_class: object, trainer_name: str) -> None:
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, TRAINER.base_class())):
        # No assert statement, which `python -O` leaves out: the name may come from a checkpoint.
        raise AssertionError(f"{trainer_name} was found ({trainer_class!r}), but it is no subclass of nnUNetTrainer")
