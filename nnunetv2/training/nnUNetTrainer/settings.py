"""Make trainers that differ from another one in a few attributes only."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

Trainer = TypeVar("Trainer", bound=type)


def with_settings(**settings: object) -> Callable[[Trainer], Trainer]:
    """Let the constructor of the decorated trainer set attributes, after that of its parent.

    The constructor takes whatever the parent's takes, so that the trainer can be combined with others and be called
    in the ways of earlier releases.
    """

    def decorate(trainer_class: Trainer) -> Trainer:
        if "__init__" in vars(trainer_class):
            raise TypeError(f"{trainer_class.__name__} has a constructor of its own: set the attributes there")

        @functools.wraps(trainer_class.__init__)
        def construct(self: object, *arguments: object, **options: object) -> None:
            super(trainer_class, self).__init__(*arguments, **options)
            for name, value in settings.items():
                setattr(self, name, value)

        trainer_class.__init__ = construct
        return trainer_class

    return decorate


def derive_trainer(parent: Trainer, name: str, description: str, module: str, **settings: object) -> Trainer:
    """Return a subclass of a trainer with other attributes, for names that follow a pattern.

    Args:
        description: Docstring of the class.
        module: `__name__` of the module that binds the class to `name`; pickling looks it up there.
    """
    return with_settings(**settings)(type(name, (parent,), {"__doc__": description, "__module__": module}))
