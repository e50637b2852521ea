"""Write the figures of a training for TensorBoard."""

from __future__ import annotations

import atexit
import json
import numbers
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class TensorBoardLogger:
    """Write scalars, settings and final figures into the folder `tensorboard` of the fold.

    A training that is started anew replaces the events of an earlier one, at its first epoch. One that goes on
    replaces the epochs that it repeats.
    """

    def __init__(self, output_folder: str | os.PathLike | None, resume: bool) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                "nnUNet_tensorboard_enabled is set, but TensorBoard is missing: pip install tensorboard"
            ) from error
        if output_folder is None:
            raise RuntimeError("logging for TensorBoard needs an output folder: set nnUNet_results")
        self.folder = Path(output_folder) / FOLDER
        self.resume = resume
        self._open_writer = SummaryWriter
        self._writer: Any = None  # a SummaryWriter, once there is something to write
        self._settings: dict[str, Any] = {}
        self._step = 0

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Add settings, each shown as a text."""
        self._settings.update(config)
        if self._writer is not None:
            self._write_settings(config)

    def log(self, key: str, value: Any, step: int) -> None:
        """Write the value of an epoch, if it is a number."""
        if not isinstance(value, numbers.Real):
            return
        if self._writer is None:
            if not self.resume and step == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._open(purge_step=step)
        if step != self._step:
            self._writer.flush()  # once per epoch: buffered values are lost when the training is killed
            self._step = step
        self._writer.add_scalar(key, float(value), step)

    def log_summary(self, key: str, value: Any) -> None:
        """Write a figure of the whole training."""
        if self._writer is None:  # a validation without training adds to earlier events
            self._open(purge_step=None)
        self._writer.add_text(f"summary/{key}", str(value))
        self._writer.flush()

    def _open(self, purge_step: int | None) -> None:
        self._writer = self._open_writer(str(self.folder), purge_step=purge_step)
        atexit.register(self._writer.close)
        self._write_settings(self._settings)

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        for name, setting in settings.items():
            text = json.dumps(setting, indent=2, default=str)
            # Markdown shows an indented block as it is.
            self._writer.add_text(f"settings/{name}", "\n".join(f"    {line}" for line in text.splitlines()))
