"""Draw the curves of a training as `progress.png`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2.training.logging.curve_files import Curves
from nnunetv2.utilities.atomic_write import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "progress.png"
SIZE_INCHES, DOTS_PER_INCH = (10, 18), 100


def draw_progress(curves: Curves, folder: Path) -> None:
    """Draw losses, Dice, duration of epochs and learning rate into `progress.png`.

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
    with replacing(folder / PICTURE_FILE) as partial:
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
