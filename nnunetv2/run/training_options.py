"""The options of `nnUNetv2_train` that stand for a trainer of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnunetv2.training.options import NOTHING, PRETRAINED_HEADS, OptionError, TrainingOptions
from nnunetv2.utilities.durations import parse_duration


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a training as options; `options_from` reads them."""
    group = parser.add_argument_group(
        "settings of the training",
        "They win over the trainer's class, are kept in checkpoints, and --c takes them over.",
    )
    group.add_argument("--epochs", type=int, metavar="N", help="Epochs, and length of the learning rate's schedule.")
    group.add_argument("--iterations", type=int, metavar="N", help="Training batches per epoch.")
    group.add_argument("--val_iterations", type=int, metavar="N", help="Validation batches per epoch.")
    group.add_argument("--initial_lr", type=float, metavar="RATE", help="Learning rate at the start.")
    group.add_argument("--weight_decay", type=float, metavar="DECAY", help="Weight decay of the optimizer.")
    group.add_argument("--batch_size", type=int, metavar="N", help="Samples per batch, of all processes together.")
    group.add_argument(
        "--oversample", type=float, metavar="SHARE", help="Share of the samples that must show foreground, 0 to 1."
    )
    group.add_argument(
        "--class_weights",
        nargs="+",
        metavar="NAME=WEIGHT",
        help="Weights of labels or regions in the cross entropy, 1 for those not named: --class_weights tumor=4",
    )
    group.add_argument(
        "--early_stopping",
        type=int,
        metavar="PATIENCE",
        help="End after so many epochs without a better EMA pseudo Dice. 0: never.",
    )
    group.add_argument("--save_every", type=int, metavar="N", help="Epochs between two checkpoint_latest.pth.")
    group.add_argument(
        "--seed", type=int, metavar="N", help="Seed of all random numbers: the training can be repeated."
    )
    group.add_argument(
        "--freeze",
        action="append",
        metavar="PATTERN",
        help="Leave parameters as they are: 'encoder', the name of a module, also with * and ?, or regex:EXPRESSION; "
        "'nothing' trains all again. May be given several times.",
    )
    command = parser.add_argument_group("this command alone")
    command.add_argument(
        "--stop_after",
        metavar="TIME",
        help="Begin no epoch that would end later, write checkpoint_final.pth and validate; --c goes on. "
        "For example 90m, 7h30m, 2d.",
    )
    command.add_argument(
        "--results_name",
        metavar="NAME",
        help="Keep these results beside others of the trainer, in TRAINER-NAME__PLANS__CONFIGURATION; other commands "
        "find them with -tr TRAINER-NAME.",
    )


def add_fine_tuning_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that set where a training starts."""
    parser.add_argument("-pretrained_weights", help="Checkpoint to start from. Not with --c.")
    parser.add_argument(
        "--pretrained_heads",
        choices=PRETRAINED_HEADS,
        help="With -pretrained_weights: whether the layers that output classes start anew, or each class from that of "
        "its name. Default: anew, as in the release; by name if the other layers do not all fit either.",
    )


def options_from(arguments: argparse.Namespace) -> TrainingOptions:
    """Return the options that were given.

    Raises:
        OptionError: One makes no sense.
    """
    try:
        stop_after_s = None if arguments.stop_after is None else parse_duration(arguments.stop_after)
    except ValueError as error:
        raise OptionError(f"--stop_after: {error}") from error
    return TrainingOptions(
        epochs=arguments.epochs,
        iterations=arguments.iterations,
        val_iterations=arguments.val_iterations,
        initial_lr=arguments.initial_lr,
        weight_decay=arguments.weight_decay,
        batch_size=arguments.batch_size,
        oversample=arguments.oversample,
        class_weights=None if arguments.class_weights is None else parse_class_weights(arguments.class_weights),
        early_stopping=arguments.early_stopping,
        save_every=arguments.save_every,
        seed=arguments.seed,
        stop_after_s=stop_after_s,
        results_name=arguments.results_name,
        freeze=None if arguments.freeze is None else _patterns(arguments.freeze),
        pretrained_heads=arguments.pretrained_heads,
    )


def _patterns(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of `--freeze`, none for `nothing`."""
    if NOTHING in texts and len(texts) > 1:
        raise OptionError(f"--freeze {NOTHING} goes with no other --freeze")
    return () if NOTHING in texts else tuple(texts)


def parse_class_weights(texts: Sequence[str]) -> dict[str, float]:
    """Return weights from texts such as `tumor=4`: name -> weight.

    Raises:
        OptionError: A text has another form, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, sign, weight = text.rpartition("=")
        try:
            if not sign or not name or name in weights:
                raise ValueError
            weights[name] = float(weight)
        except ValueError:
            raise OptionError(
                f"--class_weights: {text!r} is no NAME=WEIGHT such as tumor=4, or its name came before; other "
                "arguments go in front of this option"
            ) from None
    return weights
