"""Let a trainer follow the options of its user, or refuse them by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnunetv2.training.options import (
    NO_OPTIONS,
    OptionError,
    TrainingOptions,
    as_typed,
    check_class_names,
    option_of,
    options_in,
)
from nnunetv2.training.seeding import seed_everything, seed_from_environment, use_seed

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

ATTRIBUTES = {
    "epochs": "num_epochs",
    "iterations": "num_iterations_per_epoch",
    "val_iterations": "num_val_iterations_per_epoch",
    "initial_lr": "initial_lr",
    "weight_decay": "weight_decay",
    "oversample": "oversample_foreground_percent",
    "save_every": "save_every",
    "freeze": "freeze_patterns",
}
"""Options that set an attribute of the trainer."""


def refuse_options(trainer_class: type[nnUNetTrainer], options: TrainingOptions) -> None:
    """Raise OptionError if a trainer refuses one of the options."""
    for name in options.given():
        if name in trainer_class.refused_options:
            raise OptionError(
                f"{option_of(name)} does not go with {trainer_class.__name__}: {trainer_class.refused_options[name]}"
            )


def refuse_unknown_classes(options: TrainingOptions, dataset_json: Mapping[str, Any]) -> None:
    """Raise OptionError if a class is weighed that the network does not tell apart."""
    if options.class_weights is not None:
        check_class_names(options.class_weights, _class_names(dataset_json))


def refuse_for_validation(options: TrainingOptions, *, only_run_validation: bool) -> None:
    """Raise OptionError if there are options of a training that will not be."""
    without_effect = [option_of(name) for name in options.given() if name != "results_name"]
    if only_run_validation and without_effect:
        raise OptionError(f"--val only validates: leave out {', '.join(without_effect)}")


def prepare_trainer_(trainer: nnUNetTrainer, options: TrainingOptions, *, continue_training: bool) -> None:
    """Let a trainer follow its options; build the parts that they change.

    Without options it stays as it is.

    Args:
        continue_training: Take over the options of the checkpoint with which the training goes on.

    Raises:
        OptionError: An option contradicts a finished training, or has no effect on this trainer.
    """
    if continue_training:
        options = _take_over_(trainer, options)
    if not options.given():
        return
    apply_options_(trainer, options)
    if options.seed is not None and options.seed != seed_from_environment():
        use_seed(options.seed)  # which the training has begun with
        seed_everything(options.seed + trainer.local_rank)
    if not trainer.was_initialized:
        trainer.initialize()
    if options.class_weights is not None:
        _weigh_classes_(trainer)
    if options.freeze:
        _ensure_frozen_(trainer)
    if trainer.local_rank == 0:
        trainer.print_to_log_file(f"Options: {options}")
        for option in options_without_effect(trainer):
            trainer.print_to_log_file(
                f"WARNING: {option} seems to have no effect: {type(trainer).__name__} gives its optimizer another value"
            )


def apply_options_(trainer: nnUNetTrainer, options: TrainingOptions) -> None:
    """Set attributes of a trainer that has built nothing yet, over those of its class.

    Raises:
        OptionError: The classes of the dataset have other names, or the trainer puts its results elsewhere.
    """
    for name, value in options.lasting().items():
        if name in ATTRIBUTES:
            setattr(trainer, ATTRIBUTES[name], value)
    if options.batch_size is not None:
        trainer.configuration_manager.configuration["batch_size"] = options.batch_size
    refuse_unknown_classes(options, trainer.dataset_json)
    if options.results_name is not None and options.results_name not in str(trainer.output_folder):
        raise OptionError(
            f"--results_name {options.results_name} has no effect: {type(trainer).__name__} chooses its folder itself, "
            f"{trainer.output_folder}"
        )
    trainer.training_options = options


def continue_options(
    trainer: nnUNetTrainer, given: TrainingOptions, kept: TrainingOptions, *, epochs_done: int
) -> TrainingOptions:
    """Return the options of a resumed training: those given now over those of its checkpoint.

    Args:
        trainer: As its class and the options of the checkpoint have made it.
        epochs_done: Epochs behind the checkpoint.

    Raises:
        OptionError: The training is finished, and an option differs from the value used for it; fewer epochs are
            asked for than it has behind it; or another weight decay, which is part of the optimizer's state.
    """
    changed = {name: value for name, value in given.lasting().items() if value != value_in_use(trainer, kept, name)}
    if epochs_done >= trainer.num_epochs and changed:
        listed = ", ".join(
            f"{option_of(name)} {as_typed(name, value)} (trained with "
            f"{as_typed(name, value_in_use(trainer, kept, name))})"
            for name, value in changed.items()
        )
        raise OptionError(
            f"the training in {trainer.output_folder} is finished after {epochs_done} epochs, which contradicts "
            f"{listed}: leave that out, or train anew beside it with --results_name"
        )
    if given.epochs is not None and given.epochs < epochs_done:
        raise OptionError(f"--epochs is {given.epochs}, but the training has {epochs_done} epochs behind it already")
    if "weight_decay" in changed:
        raise OptionError(
            f"--weight_decay {given.weight_decay} cannot be used with --c: the optimizer goes on with "
            f"{trainer.weight_decay}"
        )
    return replace(given, **{**kept.lasting(), **given.lasting()})


def value_in_use(trainer: nnUNetTrainer, options: TrainingOptions, name: str) -> Any:
    """Return an option's value in use: the trainer's, where it has one."""
    if name == "batch_size":
        return trainer.configuration_manager.batch_size
    return getattr(trainer, ATTRIBUTES[name]) if name in ATTRIBUTES else getattr(options, name)


def options_without_effect(trainer: nnUNetTrainer) -> list[str]:
    """Return the options that an initialized trainer's optimizer does not know, as they are typed."""
    wanted = {"initial_lr": ("initial_lr", "lr"), "weight_decay": ("weight_decay",)}
    given = trainer.training_options.given()
    return [
        f"{option_of(name)} {given[name]}"
        for name, keys in wanted.items()
        if name in given
        and not any(group.get(key) == given[name] for group in trainer.optimizer.param_groups for key in keys)
    ]


def _take_over_(trainer: nnUNetTrainer, options: TrainingOptions) -> TrainingOptions:
    """Return the options with which a training goes on; the trainer has those of its checkpoint then."""
    from nnunetv2.models.checkpoint_file import load_checkpoint_file, rank_checkpoints

    paths = rank_checkpoints(trainer.output_folder, report=lambda line: None)  # told when the training is loaded
    if not paths:
        return options
    checkpoint = load_checkpoint_file(paths[0], mmap=True)
    kept = options_in(checkpoint, paths[0])
    if kept != NO_OPTIONS:
        apply_options_(trainer, kept)
    return continue_options(trainer, options, kept, epochs_done=int(checkpoint["current_epoch"]))


def _class_names(dataset_json: Mapping[str, Any]) -> tuple[str, ...]:
    from nnunetv2.models.weight_transfer import name_channels_and_classes  # needs torch

    return name_channels_and_classes(dataset_json, is_cascaded=False).classes


def _ensure_frozen_(trainer: nnUNetTrainer) -> None:
    from nnunetv2.training.freezing import ensure_frozen_  # needs torch

    ensure_frozen_(trainer)


def _weigh_classes_(trainer: nnUNetTrainer) -> None:
    """Give the classes of an initialized trainer their weights in its loss."""
    from nnunetv2.training.loss.class_weights import weigh_classes_

    names, wanted = _class_names(trainer.dataset_json), trainer.training_options.class_weights or {}
    if len(names) != trainer.label_manager.num_segmentation_heads:
        raise OptionError(
            f"--class_weights: the network tells {trainer.label_manager.num_segmentation_heads} classes apart, "
            f"dataset.json names {len(names)}"
        )
    weights = [float(wanted.get(name, 1)) for name in names]
    dims = len(trainer.configuration_manager.patch_size)
    if not weigh_classes_(trainer.loss, weights, dims=dims, device=trainer.device):
        raise OptionError(f"--class_weights has no effect: the loss of {type(trainer).__name__} has no cross entropy")
