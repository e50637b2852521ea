"""Draw the curves of a training as `progress.png`, beside the training rather than in its way."""
from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.utilities.atomic_write import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

Curves = Mapping[str, Sequence]
SIZE_INCHES, DOTS_PER_INCH = (10, 18), 100


def draw_progress(curves: Curves, path: Path) -> None:
    """Draw losses and Dice, the duration of epochs and the learning rate, one above the other, into a PNG file.

    As many epochs are drawn as the shortest curve has. Uses matplotlib's objects alone, no pyplot, whose global state
    belongs to the user and to the main thread.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = range(min(len(values) for values in curves.values()))
    if not epochs:
        return
    drawn = {key: values[: len(epochs)] for key, values in curves.items()}
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    quality, duration, rate = figure.subplots(3, 1)
    _draw_quality(quality, epochs, drawn)
    _draw_duration(duration, epochs, drawn)
    rate.plot(epochs, drawn["lrs"], color="b", label="learning rate")
    rate.set_ylabel("learning rate")
    for axes in (quality, duration, rate):
        axes.set_xlabel("epoch")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    with replacing(path) as partial:
        figure.savefig(partial, pil_kwargs={"compress_level": 1})  # 3 times faster than 6, and hardly larger


def _draw_quality(axes: Axes, epochs: range, curves: Curves) -> None:
    """Draw losses on the left scale and the Dice of validation patches on the right one."""
    axes.plot(epochs, curves["train_losses"], color="b", label="training loss")
    axes.plot(epochs, curves["val_losses"], color="r", label="validation loss")
    axes.set_ylabel("loss")
    axes.legend(loc="upper left")
    right = axes.twinx()
    right.plot(epochs, curves["mean_fg_dice"], color="g", linestyle="dotted", label="pseudo Dice")
    right.plot(epochs, curves["ema_fg_dice"], color="g", label="pseudo Dice, moving average")
    right.set_ylabel("pseudo Dice")
    right.legend(loc="lower right")


def _draw_duration(axes: Axes, epochs: range, curves: Curves) -> None:
    """Draw how long each epoch took, in seconds."""
    ends, starts = curves["epoch_end_timestamps"], curves["epoch_start_timestamps"]
    axes.plot(epochs, [end - start for end, start in zip(ends, starts)], color="b", label="epoch duration")
    axes.set_ylabel("epoch duration [s]")
    axes.set_ylim(bottom=0)


class BackgroundPlotter:
    """Draw in a thread of its own, always the newest curves: epochs shorter than a drawing are not all drawn.

    The thread lives while there is something to draw. It is no daemon, so the last picture is complete when the
    program ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: tuple[Curves, Path] | None = None
        self._thread: threading.Thread | None = None

    def draw_soon(self, curves: Curves, path: Path) -> None:
        """Draw a copy of the curves, taken now, into a file."""
        with self._lock:
            self._pending = {key: list(values) for key, values in curves.items()}, path
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw_pending, name="progress.png", daemon=False)
                self._thread.start()

    def wait(self) -> None:
        """Return as soon as everything asked for is drawn."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def __getstate__(self) -> dict:
        """Leave the thread behind: a copy of the logger that goes to another process starts its own."""
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def _draw_pending(self) -> None:
        while True:
            with self._lock:
                if self._pending is None:
                    self._thread = None
                    return
                (curves, path), self._pending = self._pending, None
            try:
                draw_progress(curves, path)
            except (OSError, ValueError, TypeError) as error:  # a full disk or an odd value must not stop the training
                logger.warning("could not draw %s: %s", path, error)
