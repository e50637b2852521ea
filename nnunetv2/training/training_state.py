"""Gather the content of a checkpoint from a trainer, and restore it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnunetv2.models.networks import adapt_weight_names, bare_network
from nnunetv2.training.optimization import load_optimizer_state_, portable_optimizer_state
from nnunetv2.training.options import CHECKPOINT_KEY

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def describe_state(trainer: nnUNetTrainer) -> dict[str, Any]:
    """Return the content of a checkpoint, with which the next epoch can be trained.

    Its tensors are the trainer's own.

    The names of weights are those of the bare network, without the prefixes of DDP and torch.compile.
    """
    scaler = trainer.grad_scaler
    options = trainer.training_options.lasting()
    return {
        "network_weights": bare_network(trainer.network).state_dict(),
        "optimizer_state": portable_optimizer_state(trainer.optimizer),
        "grad_scaler_state": None if scaler is None else scaler.state_dict(),
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": trainer.current_epoch + 1,
        "init_args": _describe_construction(trainer),
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        **({CHECKPOINT_KEY: options} if options else {}),
        **({"stopped": trainer.stopped} if trainer.stopped else {}),
    }


def restore_state_(trainer: nnUNetTrainer, checkpoint: Mapping[str, Any]) -> None:
    """Bring an initialized trainer to the state of a checkpoint.

    Saved here or by the reference.
    """
    network = bare_network(trainer.network)
    network.load_state_dict(adapt_weight_names(checkpoint["network_weights"], network.state_dict()))
    trainer.current_epoch, trainer._best_ema = checkpoint["current_epoch"], checkpoint["_best_ema"]
    trainer.my_init_kwargs = checkpoint["init_args"]
    trainer.logger.load_checkpoint(checkpoint["logging"])
    trainer.inference_allowed_mirroring_axes = checkpoint.get(
        "inference_allowed_mirroring_axes", trainer.inference_allowed_mirroring_axes
    )
    load_optimizer_state_(trainer.optimizer, checkpoint["optimizer_state"])
    if trainer.grad_scaler is not None and checkpoint.get("grad_scaler_state") is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])


def _describe_construction(trainer: nnUNetTrainer) -> dict[str, Any]:
    """Return the arguments that the trainer was built with.

    Those of a subclass are known by the attributes of their names, and left out where these are no plain data: only
    such data can be loaded without running code of others.
    """
    own = [name for name in inspect.signature(type(trainer).__init__).parameters if name not in trainer.my_init_kwargs]
    values = {name: getattr(trainer, name) for name in own if name != "self" and hasattr(trainer, name)}
    return {**trainer.my_init_kwargs, **{name: value for name, value in values.items() if _is_plain(value)}}


def _is_plain(value: Any) -> bool:
    """Tell whether a value consists of numbers, text and containers of them."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str)
