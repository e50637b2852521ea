"""The three roots of nnU-Net and the folder of external trainers.

Read from the environment whenever they are used.
"""

from __future__ import annotations

import os


class EnvironmentPath(os.PathLike):
    """A folder that an environment variable names.

    Importing nnunetv2 needs no variable. Using the path (`str`, `os.path.join`, `open`, ...) while its variable is
    unset raises an error that says which one to set. One that is set to nothing counts as unset, for it would name the
    current folder.
    """

    # Its value may change between two uses, so it must not become a key.
    __hash__ = None

    def __init__(self, env_var_name: str, missing_message: str) -> None:
        self.env_var_name = env_var_name
        self.missing_message = missing_message

    def get(self) -> str | None:
        """Return the folder, or None while the variable is unset."""
        folder = os.environ.get(self.env_var_name, "")
        return folder if folder.strip() else None

    def is_set(self) -> bool:
        """Tell whether the variable is set."""
        return self.get() is not None

    def require(self) -> str:
        """Return the folder.

        Raises:
            RuntimeError: The variable is unset, or its folder stands in quotes.
        """
        folder = self.get()
        if folder is not None and folder[0] == folder[-1] and folder[0] in "\"'":
            raise RuntimeError(
                f"The environment variable {self.env_var_name} has quotes in its value, {folder}: it would name a "
                "folder below the current one. Set it without them; docker --env-file, for one, keeps them"
            )
        if folder is None:
            state = "is set to nothing" if self.env_var_name in os.environ else "is not set"
            raise RuntimeError(
                f"The environment variable {self.env_var_name} {state}. {self.missing_message} "
                "documentation/getting-started.md explains how to set it."
            )
        return folder

    def __bool__(self) -> bool:
        return self.is_set()

    def __str__(self) -> str:
        return self.require()

    def __fspath__(self) -> str:
        return self.require()

    def __repr__(self) -> str:
        folder = self.get()
        return f"<unset {self.env_var_name}>" if folder is None else repr(folder)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, EnvironmentPath):
            return self.get() == other.get()
        if other is None or isinstance(other, str):
            return self.get() == other
        return NotImplemented


nnUNet_raw = EnvironmentPath("nnUNet_raw", "It names the folder of raw datasets, needed to plan and preprocess.")
nnUNet_preprocessed = EnvironmentPath(
    "nnUNet_preprocessed", "It names the folder of preprocessed data, needed to preprocess and to train."
)
nnUNet_results = EnvironmentPath(
    "nnUNet_results", "It names the folder of trained models, needed to train and to predict."
)
nnUNet_extTrainer = EnvironmentPath(
    "nnUNet_extTrainer", "It names one or several folders with trainer classes of your own."
)
