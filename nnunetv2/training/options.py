"""The settings of a training that its user gives beside the trainer.

They win over the settings of the trainer's class, are kept in checkpoints and taken over by a resumed training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

CHECKPOINT_KEY = "training_options"
"""Where a checkpoint keeps them. One of a training without options does not have it."""

LARGEST_SEED = 2**32 - 1

_OF_ONE_COMMAND = ("stop_after_s", "results_name", "pretrained_heads")
"""Options of a single command; no checkpoint keeps them."""

_RESULTS_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]|_(?!_))*(?<!_)")
_LONGEST_RESULTS_NAME = 60


NEW, BY_NAME = PRETRAINED_HEADS = ("new", "by_name")

NOTHING = "nothing"
"""How no pattern at all is typed."""

BEFORE_RESULTS_NAME = "-"
"""Between a trainer and the name of its results; no class has it in its name."""


class OptionError(ValueError):
    """An option makes no sense, contradicts a setting, or has no effect."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The wishes of the user of a training. None leaves it to the trainer."""

    epochs: int | None = None
    """Length of the training, and of the schedule of its learning rate."""
    iterations: int | None = None
    """Training batches per epoch."""
    val_iterations: int | None = None
    """Validation batches per epoch."""
    initial_lr: float | None = None
    """Learning rate at which the schedule begins."""
    weight_decay: float | None = None
    batch_size: int | None = None
    """Samples per batch, of all processes together."""
    oversample: float | None = None
    """Share of the samples that must show foreground, from 0 to 1."""
    class_weights: Mapping[str, float] | None = None
    """Name of a label or region -> weight in the cross entropy; 1 for those that are not named."""
    early_stopping: int | None = None
    """Epochs without a new best EMA pseudo Dice after which the training ends. 0: never."""
    save_every: int | None = None
    """Epochs from one checkpoint_latest to the next."""
    seed: int | None = None
    """Of all random numbers."""
    freeze: tuple[str, ...] | None = None
    """Patterns of parameters that stay as they are, see `freezing.py`. Empty: none, whatever the trainer says."""
    stop_after_s: float | None = None
    """Seconds after which no further epoch begins."""
    results_name: str | None = None
    """Ending of the trainer's name in the folder of the results."""
    pretrained_heads: str | None = None
    """With pretrained weights: whether layers that output classes start anew (NEW), or by names of classes (BY_NAME).
    None: by name where other layers have to be adapted, too."""

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations", "val_iterations", "batch_size", "save_every"):
            self._require(name, int, "a whole number from 1 on", lambda value: value >= 1)
        self._require("early_stopping", int, "a whole number from 0 on", lambda value: value >= 0)
        self._require("seed", int, f"a whole number from 0 to {LARGEST_SEED}", lambda value: 0 <= value <= LARGEST_SEED)
        self._require("initial_lr", float, "a number above 0", lambda value: 0 < value < math.inf)
        self._require("weight_decay", float, "a number from 0 on", lambda value: 0 <= value < math.inf)
        self._require("oversample", float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
        self._require("stop_after_s", float, "a time above 0", lambda value: 0 < value < math.inf)
        if self.class_weights is not None:
            _check_class_weights(self.class_weights)
        if self.results_name is not None:
            check_results_name(self.results_name)
        if self.freeze is not None and not _are_texts(self.freeze):
            raise OptionError(f"--freeze is {self.freeze!r}: expected patterns such as 'encoder'")
        if self.pretrained_heads not in (None, *PRETRAINED_HEADS):
            raise OptionError(
                f"--pretrained_heads is {self.pretrained_heads!r}: expected {' or '.join(PRETRAINED_HEADS)}"
            )

    def __str__(self) -> str:
        """Return the options as they are typed, those that were given."""
        return " ".join(f"{option_of(name)} {as_typed(name, value)}" for name, value in self.given().items())

    def given(self) -> dict[str, Any]:
        """Return the options that were given: name -> value."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def lasting(self) -> dict[str, Any]:
        """Return those of them that a checkpoint keeps, as plain data."""
        kept = {name: value for name, value in self.given().items() if name not in _OF_ONE_COMMAND}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in kept.items()}

    def _require(self, name: str, kind: type, expected: str, is_right: Any) -> None:
        value = getattr(self, name)
        if value is None:
            return
        is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not is_number or not is_right(value):
            raise OptionError(f"{option_of(name)} is {value!r}: expected {expected}")


NO_OPTIONS = TrainingOptions()


def option_of(name: str) -> str:
    """Return an option as it is typed: `stop_after_s` -> `--stop_after`."""
    return f"--{name.removesuffix('_s')}" if name in _OF_ONE_COMMAND else f"--{name}"


def check_results_name(name: str) -> None:
    """Raise OptionError if a folder of results cannot be called so."""
    if not isinstance(name, str) or len(name) > _LONGEST_RESULTS_NAME or not _RESULTS_NAME.fullmatch(name):
        raise OptionError(
            f"--results_name is {name!r}: expected at most {_LONGEST_RESULTS_NAME} letters, digits, '.', '-' and "
            "single '_', beginning with a letter or digit and not ending with '_'"
        )


def split_results_name(trainer_name: str, options: TrainingOptions) -> tuple[str, TrainingOptions]:
    """Split TRAINER-NAME, as folders of results are called, into class and options.

    Raises:
        OptionError: `results_name` says something else.
    """
    trainer_class, separator, name = trainer_name.partition(BEFORE_RESULTS_NAME)
    if not separator or name == options.results_name:
        return trainer_class, options
    if options.results_name is not None:
        raise OptionError(f"-tr {trainer_name} and --results_name {options.results_name} name different results")
    return trainer_class, replace(options, results_name=name)


def options_in(checkpoint: Mapping[str, Any], source: object) -> TrainingOptions:
    """Return the options that a checkpoint keeps.

    Args:
        source: The file, for messages.

    Raises:
        OptionError: There is one that this version does not know, or a value makes no sense.
    """
    kept = checkpoint.get(CHECKPOINT_KEY, {})
    known = [field.name for field in fields(TrainingOptions) if field.name not in _OF_ONE_COMMAND]
    unknown = sorted(map(str, set(kept) - set(known))) if isinstance(kept, Mapping) else [repr(kept)]
    if unknown:
        raise OptionError(f"{source} was trained with options that this version does not know: {', '.join(unknown)}")
    try:
        return TrainingOptions(**kept)
    except OptionError as error:
        raise OptionError(f"{source}: {error}") from error


def check_class_names(weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise OptionError if a weight is for something that the network does not tell apart."""
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise OptionError(f"--class_weights: there is no class {', '.join(unknown)}; there are {', '.join(names)}")


def _check_class_weights(weights: Any) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise OptionError(f"--class_weights is {weights!r}: expected a weight for a name, such as tumor=4")
    for name, weight in weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not isinstance(name, str) or not is_number or not 0 <= weight < math.inf:
            raise OptionError(f"--class_weights: the weight of {name} is {weight!r}: expected a number from 0 on")


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, str) and one for one in value)


def as_typed(name: str, value: Any) -> str:
    """Return the value of an option as it is typed."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={weight:g}" for key, weight in value.items())
    if isinstance(value, tuple):
        return f" {option_of(name)} ".join(value) or NOTHING
    return f"{value:g}s" if name == "stop_after_s" else str(value)
