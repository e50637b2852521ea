"""Keep a training's curves, and pass their values on to other loggers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nnunetv2.training.logging.cluster_job import get_cluster_job_id as get_cluster_job_id
from nnunetv2.training.logging.curve_files import split_entries

if TYPE_CHECKING:
    from nnunetv2.training.logging.background_reports import BackgroundReporter

logger = logging.getLogger(__name__)

CURVES = (
    "mean_fg_dice",
    "ema_fg_dice",
    "dice_per_class_or_region",
    "train_losses",
    "val_losses",
    "lrs",
    "epoch_start_timestamps",
    "epoch_end_timestamps",
)
EMA_MEMORY = 0.9


def is_switched_on(variable: str) -> bool:
    """Read an environment variable that switches a logger on, such as `nnUNet_wandb_enabled`.

    Raises:
        RuntimeError: Its value is neither of 0, False, false, 1, True and true.
    """
    value = os.environ.get(variable, "0")
    if value not in ("0", "False", "false", "1", "True", "true"):
        raise RuntimeError(f"{variable} is {value!r}; set it to 1 (true) or to 0 (false)")
    return value in ("1", "True", "true")


def _is_first_process() -> bool:
    """Tell whether this is the only process of the training or the first of several."""
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


class ExternalLogger(Protocol):
    """A further listener to a training: hand such an object to `MetaLogger.add_logger`."""

    def update_config(self, config: Mapping[str, Any]) -> None: ...

    def log(self, key: str, value: Any, step: int) -> None: ...

    def log_summary(self, key: str, value: Any) -> None: ...


class LocalLogger:
    """Hold one list per curve with one entry per epoch, in `my_fantastic_logging`.

    Register a curve of your own with `my_fantastic_logging["name"] = []`, then log it once per epoch.
    """

    def __init__(self, verbose: bool = False) -> None:
        self.my_fantastic_logging: dict[str, list] = {key: [] for key in CURVES}
        self.verbose = verbose
        self._reporter: BackgroundReporter | None = None

    def log(self, key: str, value: Any, epoch: int) -> None:
        """Append the value of an epoch, or replace the one it has.

        Raises:
            AssertionError: The curve is not registered, or has later epochs already.
        """
        assert key in self.my_fantastic_logging, (
            f"there is no curve {key!r}; register it first: my_fantastic_logging[{key!r}] = []"
        )
        values = self.my_fantastic_logging[key]
        assert len(values) <= epoch + 1, f"{key} has {len(values)} epochs already, epoch {epoch} is over"
        if self.verbose:
            logger.info("epoch %d: %s = %s", epoch, key, value)
        if len(values) == epoch + 1:
            logger.info("%s of epoch %d is replaced: %s becomes %s", key, epoch, values[epoch], value)
            values[epoch] = value
        else:
            values.append(value)

    def get_value(self, key: str, step: int | None) -> Any:
        """Return the value of an epoch (-1: the latest), or the whole list.

        The list if `step` is None.
        """
        values = self.my_fantastic_logging[key]
        return values if step is None else values[step]

    def plot_progress_png(self, output_folder: str | os.PathLike) -> None:
        """Write `progress.png`, `progress.csv` and `progress.json` into a folder, in the background.

        `wait_for_plot` waits until they are written.
        """
        if self._reporter is None:
            self._reporter = _build_reporter()
        self._reporter.write_soon(self.my_fantastic_logging, Path(output_folder))

    def wait_for_plot(self) -> None:
        """Return as soon as the latest files asked for are written."""
        if self._reporter is not None:
            self._reporter.wait()

    def get_checkpoint(self) -> dict[str, list]:
        """Return the curves, to be stored in a checkpoint."""
        return self.my_fantastic_logging

    def load_checkpoint(self, checkpoint: dict[str, list]) -> None:
        """Take over the curves of a checkpoint."""
        self.my_fantastic_logging = checkpoint


class MetaLogger:
    """Log to the local curves and to every external logger.

    Args:
        output_folder: Folder of the fold; external loggers keep their files there.
        resume: The training goes on from a checkpoint.
        verbose: Report each logged value.
    """

    def __init__(self, output_folder: str | os.PathLike | None, resume: bool, verbose: bool = False) -> None:
        self.output_folder = output_folder
        self.resume = resume
        self.loggers: list[ExternalLogger] = []
        self.local_logger = LocalLogger(verbose)
        self._config: dict[str, Any] = {}
        for external in _build_external_loggers(output_folder, resume):
            self.add_logger(external)

    @property
    def my_fantastic_logging(self) -> dict[str, list]:
        """The local curves, where trainers written for earlier releases look for them."""
        return self.local_logger.my_fantastic_logging

    def add_logger(self, external: ExternalLogger) -> None:
        """Let another logger hear everything from now on, and the settings known already.

        Only the first process of a distributed training adds it: each figure is logged once.
        """
        if not _is_first_process():
            return
        self.loggers.append(external)
        if self._config:
            external.update_config(dict(self._config))

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Tell external loggers about settings of the training."""
        self._config.update(config)
        for external in self.loggers:
            external.update_config(config)

    def log(self, key: str, value: Any, step: int) -> None:
        """Log the value of an epoch; a new `mean_fg_dice` continues `ema_fg_dice`.

        External loggers get a list as one curve per entry, `<key>/class_1` and so on.
        """
        self.local_logger.log(key, value, step)
        for external in self.loggers:
            for name, entry in split_entries(key, value).items():
                external.log(name, entry, step)
        if key == "mean_fg_dice":
            earlier = self.local_logger.get_value("ema_fg_dice", None)[:step]
            self.log("ema_fg_dice", continue_ema(earlier, value), step)

    def log_summary(self, key: str, value: Any) -> None:
        """Tell external loggers a figure of the whole training."""
        for external in self.loggers:
            external.log_summary(key, value)

    def get_value(self, key: str, step: int | None) -> Any:
        """Return a local value of an epoch (-1: the latest), or the whole list.

        The list if `step` is None.
        """
        return self.local_logger.get_value(key, step)

    def plot_progress_png(self, output_folder: str | os.PathLike) -> None:
        """Write `progress.png`, `progress.csv` and `progress.json` into a folder, in the background."""
        self.local_logger.plot_progress_png(output_folder)

    def get_checkpoint(self) -> dict[str, list]:
        """Return the local curves, to be stored in a checkpoint."""
        return self.local_logger.get_checkpoint()

    def load_checkpoint(self, checkpoint: dict[str, list]) -> None:
        """Take over the curves of a checkpoint."""
        self.local_logger.load_checkpoint(checkpoint)


def continue_ema(earlier: list, value: Any) -> Any:
    """Return the next entry of the exponential moving average whose entries so far are `earlier`.

    An epoch without a value (NaN: no validation patch held any foreground) leaves the average where it was. It is
    NaN only before the first value.
    """
    known = [entry for entry in earlier if not math.isnan(entry)]
    if not known:
        return value
    return known[-1] if math.isnan(value) else EMA_MEMORY * known[-1] + (1 - EMA_MEMORY) * value


def _build_external_loggers(output_folder: str | os.PathLike | None, resume: bool) -> list[ExternalLogger]:
    """Build the loggers that environment variables switch on, in the first process alone.

    Further processes would start runs of their own, or delete the first one's files.
    """
    wants_wandb = is_switched_on("nnUNet_wandb_enabled")
    wants_tensorboard = is_switched_on("nnUNet_tensorboard_enabled")
    loggers: list[ExternalLogger] = []
    if not _is_first_process():
        return loggers
    if wants_wandb:
        from nnunetv2.training.logging.wandb_logger import WandbLogger

        loggers.append(WandbLogger(output_folder, resume))
    if wants_tensorboard:
        from nnunetv2.training.logging.tensorboard_logger import TensorBoardLogger

        loggers.append(TensorBoardLogger(output_folder, resume))
    return loggers


def _build_reporter() -> BackgroundReporter:
    from nnunetv2.training.logging.background_reports import BackgroundReporter
    from nnunetv2.training.logging.curve_files import write_csv, write_json
    from nnunetv2.training.logging.progress_plot import draw_progress

    return BackgroundReporter((write_csv, write_json, draw_progress))


class nnUNetLogger(MetaLogger):
    """The logger of earlier releases, as trainers written for them construct it: without a folder."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__(None, resume=False, verbose=verbose)


def __getattr__(name: str) -> Any:
    # WandbLogger has a module of its own and is part of this one's interface; most trainings never need it.
    if name == "WandbLogger":
        from nnunetv2.training.logging.wandb_logger import WandbLogger

        return WandbLogger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
