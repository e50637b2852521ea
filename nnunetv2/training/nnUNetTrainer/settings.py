"""Make trainers that differ from another in a few attributes only.

Entries of the plans count, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

Trainer = TypeVar("Trainer", bound=type)


def with_settings(**settings: object) -> Callable[[Trainer], Trainer]:
    """Let the constructor of the decorated trainer set attributes, after that of its parent.

    The constructor takes whatever the parent's takes, so that the trainer can be combined with others and be called
    in the ways of earlier releases.
    """

    def construct(parent: Any, self: Any, *arguments: Any, **options: Any) -> None:
        parent(*arguments, **options)
        for name, value in settings.items():
            setattr(self, name, value)

    return _constructed_by(construct)


def with_batch_size(batch_size: int) -> Callable[[Trainer], Trainer]:
    """Let the decorated trainer use another batch size than its plans."""

    def construct(parent: Any, self: Any, *arguments: Any, **options: Any) -> None:
        parent(*arguments, **options)
        self.configuration_manager.configuration["batch_size"] = batch_size

    return _constructed_by(construct)


def with_plans(**entries: object) -> Callable[[Trainer], Trainer]:
    """Let the decorated trainer replace entries of its configuration in a copy of the plans.

    They are part of the trained model, so that prediction knows them.
    """

    def construct(parent: Any, self: Any, plans: dict, configuration: str, *arguments: Any, **options: Any) -> None:
        configurations = plans["configurations"]
        if configuration in configurations:  # if not, the trainer says so
            changed = {**configurations[configuration], **deepcopy(entries)}
            plans = {**plans, "configurations": {**configurations, configuration: changed}}
        parent(plans, configuration, *arguments, **options)

    return _constructed_by(construct)


def _constructed_by(construct: Callable[..., None]) -> Callable[[Trainer], Trainer]:
    """Return a decorator that gives a class the constructor `construct(parent's constructor, self, ...)`."""

    def decorate(trainer_class: Any) -> Any:
        if "__init__" in vars(trainer_class):
            raise TypeError(f"{trainer_class.__name__} has a constructor of its own: set the attributes there")

        @functools.wraps(trainer_class.__init__)
        def constructor(self: object, *arguments: object, **options: object) -> None:
            construct(super(trainer_class, self).__init__, self, *arguments, **options)

        trainer_class.__init__ = constructor
        return trainer_class

    return decorate


def derive_trainer(parent: Trainer, name: str, description: str, module: str, **settings: object) -> Any:
    """Return a subclass of a trainer with other attributes, for names that follow a pattern.

    Args:
        description: Docstring of the class.
        module: `__name__` of the module that binds the class to `name`; pickling looks it up there.
    """
    return with_settings(**settings)(type(name, (parent,), {"__doc__": description, "__module__": module}))
