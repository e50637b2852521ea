"""Keep parts of a network as they are while the rest is trained.

A frozen tensor gets no gradient, and an optimizer leaves tensors without one alone: neither weight decay nor momentum
touches them. Batch normalization counts as frozen with its own weight and bias; it then normalises with the statistics
that it has, as in prediction, and does not change them. Instance normalization has no statistics to keep.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from nnunetv2.models.networks import bare_network
from nnunetv2.training.distributed import is_distributed

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

REGULAR_EXPRESSION = "regex:"
_ENCODER = "encoder"


def match_parameters(network: nn.Module, pattern: str) -> list[str]:
    """Return the parameters that a pattern means, each under the first of its names.

    Args:
        network: May be wrapped by DDP or torch.compile.
        pattern: `regex:` with a regular expression that is searched for in the names; else the name of a module or a
            parameter, in which `*`, `?` and `[...]` stand for characters, as in file names.

    Raises:
        ValueError: It matches nothing, or is no regular expression.
    """
    network = bare_network(network)
    names = [name for name, _ in network.named_parameters()]
    if pattern.startswith(REGULAR_EXPRESSION):
        try:
            expression = re.compile(pattern.removeprefix(REGULAR_EXPRESSION))
        except re.error as error:
            raise ValueError(f"--freeze {pattern}: no regular expression, {error}") from error
        found = [name for name in names if expression.search(name)]
    else:
        found = [name for name in names if is_in_module(name, pattern)]
    if not found and pattern == _ENCODER:
        found = [name for name in names if any(is_in_module(name, part) for part in _encoder_parts(network))]
    if not found:
        modules = dict.fromkeys(name.split(".")[0] for name in names)
        raise ValueError(
            f"--freeze {pattern}: no parameter of the network has such a name; they begin with "
            f"{', '.join(modules)}, for example {names[0]}"
        )
    return found


def freeze_(network: nn.Module, patterns: Sequence[str]) -> str:
    """Freeze the parameters that the patterns mean, and return a line for the log.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(bare_network(network).named_parameters())
    frozen = dict.fromkeys(name for pattern in patterns for name in match_parameters(network, pattern))
    if len(frozen) == len(parameters):
        raise ValueError(f"--freeze {' '.join(patterns)}: all parameters would be frozen, and nothing trained")
    for name in frozen:
        parameters[name].requires_grad_(False)
    numbers = [sum(parameters[name].numel() for name in names) for names in (frozen, parameters)]
    return (
        f"Frozen ({', '.join(patterns)}): {len(frozen)} of {len(parameters)} tensors, {numbers[0]:,} of "
        f"{numbers[1]:,} parameters"
    )


def keep_frozen_statistics_(network: nn.Module) -> None:
    """Put frozen batch normalizations into evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(one.requires_grad for one in parameters):
                module.eval()


def ensure_frozen_(trainer: nnUNetTrainer) -> None:
    """Freeze the parameters that a trainer shall keep, if `initialize` did not.

    Raises:
        RuntimeError: It is too late: the processes of a training have agreed on the parameters to train.
    """
    parameters = dict(bare_network(trainer.network).named_parameters())
    wanted = [name for pattern in trainer.freeze_patterns for name in match_parameters(trainer.network, pattern)]
    if not any(parameters[name].requires_grad for name in wanted):
        return
    if is_distributed():
        raise RuntimeError(
            f"{type(trainer).__name__} builds its network without regard to --freeze: with several processes it "
            "cannot be obeyed. Train with one process, or call freeze_ where the trainer builds the network"
        )
    trainer.print_to_log_file(freeze_(trainer.network, trainer.freeze_patterns))


def is_in_module(name: str, pattern: str) -> bool:
    """Tell whether a tensor, or a module around it, has a name of this pattern.

    `*`, `?` and `[...]` stand for characters.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _encoder_parts(network: nn.Module) -> list[str]:
    """Return the modules that a network without an `encoder` says are its encoder and its stem."""
    keys = (getattr(network, "key_to_encoder", None), getattr(network, "key_to_stem", None))
    return [key for key in keys if isinstance(key, str)]
