"""Find the Primus networks of dynamic_network_architectures, and check that patches fit them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PATCH_EMBED_SIZE = (8, 8, 8)
"""Voxels that become one token."""

_MODULE = "dynamic_network_architectures.architectures.primus"
_OLDEST_WITH_ALL = "0.4.4"


def find_primus(name: str) -> type[nn.Module]:
    """Return a Primus network class by its name.

    Raises:
        RuntimeError: The class is not there, or a package that it needs does not import; the message names which.
    """
    for package in ("torchvision", "timm", "einops", _MODULE):
        try:
            module = import_module(package)
        except Exception as error:  # a torchvision that does not fit torch raises whatever the first misfit raises
            reason = str(error).partition("\n")[0]
            raise RuntimeError(
                f"Primus needs {package}, which does not import here ({type(error).__name__}: "
                f"{reason}). {_remedy(package)}. Other trainers do without it"
            ) from error
    if not hasattr(module, name):
        raise RuntimeError(
            f"{name} needs dynamic-network-architectures {_OLDEST_WITH_ALL} or later, installed is "
            f"{version('dynamic-network-architectures')}"
        )
    return getattr(module, name)


def _remedy(package: str) -> str:
    if package != "torchvision":
        return f"Install it again: pip install --force-reinstall --no-deps {package.split('.')[0].replace('_', '-')}"
    return (
        "Install the torchvision that belongs to the installed torch, from the same place "
        f"(torch is {version('torch')})"
    )


def require_fitting_patch(patch_size: Sequence[int], trainer_name: str) -> None:
    """Refuse patches that cannot be cut into tokens.

    Raises:
        ValueError: The patch does not have three axes, or one that tokens do not divide.
    """
    patch = tuple(int(length) for length in patch_size)
    if len(patch) != len(PATCH_EMBED_SIZE):
        raise ValueError(f"{trainer_name} trains 3D configurations only; the patch size {patch} has {len(patch)} axes")
    fitting = tuple(
        max(token, (length + token // 2) // token * token) for length, token in zip(patch, PATCH_EMBED_SIZE)
    )
    if patch != fitting:
        raise ValueError(
            f"{trainer_name} needs a patch size whose axes are multiples of {PATCH_EMBED_SIZE[0]}, got "
            f"{patch}; the nearest that fits is {fitting}: set it as patch_size of the configuration in "
            "the plans file"
        )
