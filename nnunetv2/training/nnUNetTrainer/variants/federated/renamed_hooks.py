"""Keep trainers working that use earlier names of hooks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as _Trainer
else:
    _Trainer = object  # the mixin stands before a trainer class of the user's choice

NEW_NAMES = {
    "meet_the_others": "exchange_weights",
    "go_on_after": "resume_after",
    "go_on_at": "resume_at",
    "end_here": "finish_run",
    "own_weights": "local_weights",
    "tell": "log_line",
}


class RenamedHooks(_Trainer):
    """Give every subclass each hook under both names, so `super()` finds both."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for old, new in NEW_NAMES.items():
            own = vars(cls)
            if new in own:
                setattr(cls, old, own[new])
            elif old in own:
                warnings.warn(f"{cls.__name__}.{old} is now called {new}", DeprecationWarning, stacklevel=2)
                setattr(cls, new, own[old])
