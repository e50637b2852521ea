"""Import a module without the libraries that it rarely needs.

The spatial transform of batchgeneratorsv2 imports pandas and scipy.ndimage for one function each, which our affine
transforms never call. The two take half a second: a third of the time until the first step of a training, besides
torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any


@contextmanager
def importing_late(*names: str) -> Iterator[None]:
    """Delay imports of some libraries until their functions are called.

    It holds for modules that are imported in this context.

    Libraries that are imported already are left as they are; afterwards, everybody else imports the real ones.
    """
    stand_ins = {name: _LateModule(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


class _LateModule(ModuleType):
    """Have any function that is asked for."""

    def __getattr__(self, name: str) -> _LateFunction:
        if name.startswith("__"):  # the import system looks for these
            raise AttributeError(f"module {self.__name__!r} is imported late and has no {name} before")
        return _LateFunction(self.__name__, name)


@dataclass(frozen=True)
class _LateFunction:
    """Call a function of a module, which is imported only then. Can be pickled and copied."""

    module: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(self.module), self.name)(*args, **kwargs)
