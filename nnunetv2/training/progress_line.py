"""Show the progress of a training on one line of the terminal.

It is written again and again.

Epoch 12/1000  training 137/250  loss -0.4312  pseudo Dice 0.8123  0.21 s/it  2 d 6 h left
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TextIO

from nnunetv2.utilities.durations import format_duration

SECONDS_BETWEEN_UPDATES = 0.5
CLEAR_LINE = "\r\033[K"


@dataclass(frozen=True)
class Position:
    """A phase of an epoch, and how many of its iterations are done.

    Training or validation.
    """

    epoch: int
    num_epochs: int
    phase: str
    num_iterations: int
    iteration: int = 0


def format_progress(
    position: Position,
    *,
    loss: float | None,
    dice: float | None,
    seconds_per_iteration: float | None,
    seconds_left: float | None,
) -> str:
    """Return the line; figures that are not known yet are left out."""
    parts = [
        f"Epoch {position.epoch}/{position.num_epochs}",
        f"{position.phase} {position.iteration}/{position.num_iterations}",
    ]
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if dice is not None:
        parts.append(f"pseudo Dice {dice:.4f}")
    if seconds_per_iteration is not None:
        parts.append(f"{seconds_per_iteration:.2f} s/it")
    if seconds_left is not None:
        parts.append(f"{format_duration(seconds_left)} left")
    return "  ".join(parts)


@dataclass
class ProgressLine:
    """Keep the line up to date. Nothing is written where there is no terminal.

    Args:
        stream: Where to write; a terminal or not.
        clock: Tells the time in seconds.
        is_enabled: False in processes that leave the terminal to another one.
    """

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    is_enabled: bool = True
    _is_shown: bool = False
    _last_update: float = field(default=float("-inf"))
    _epoch_durations: list[float] = field(default_factory=list)
    _epoch_start: float | None = None

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal to write to."""
        return self.is_enabled and bool(getattr(self.stream, "isatty", lambda: False)())

    def start_epoch(self) -> None:
        """Note that an epoch begins."""
        self._epoch_start = self.clock()

    def end_epoch(self) -> None:
        """Note that the epoch is over.

        The last few tell how long the others will take.
        """
        if self._epoch_start is not None:
            self._epoch_durations = [*self._epoch_durations[-4:], self.clock() - self._epoch_start]
        self._epoch_start = None
        self.clear()

    def count(self, phase: Position, *, loss: Callable[[], float | None], dice: float | None) -> Iterator[int]:
        """Yield the number of each iteration of a phase, and show how far it is.

        `loss` is asked only when the line is written: fetching it makes the program wait for a GPU.
        """
        start = self.clock()
        for number in range(phase.num_iterations):
            yield number
            if self.is_live and self.clock() - self._last_update >= SECONDS_BETWEEN_UPDATES:
                reached = replace(phase, iteration=number + 1)
                pace = (self.clock() - start) / (number + 1)
                self.show(
                    format_progress(
                        reached,
                        loss=loss(),
                        dice=dice,
                        seconds_per_iteration=pace,
                        seconds_left=self._seconds_left(reached, pace),
                    )
                )

    def show(self, text: str) -> None:
        """Write the line in place of the last one, cut to the terminal's width."""
        width = shutil.get_terminal_size().columns
        self.stream.write(CLEAR_LINE + text[: width - 1])
        self.stream.flush()
        self._is_shown, self._last_update = True, self.clock()

    def clear(self) -> None:
        """Remove the line, to make room for others."""
        if self._is_shown:
            self.stream.write(CLEAR_LINE)
            self.stream.flush()
            self._is_shown = False

    def _seconds_left(self, position: Position, pace: float) -> float:
        """Estimate from whole epochs where there are some, else from the pace of this one's iterations."""
        later_epochs = position.num_epochs - position.epoch - 1
        here = (position.num_iterations - position.iteration) * pace
        if self._epoch_durations and self._epoch_start is not None:
            duration = sorted(self._epoch_durations)[len(self._epoch_durations) // 2]
            return max(here, duration - (self.clock() - self._epoch_start)) + later_epochs * duration
        return here + later_epochs * position.num_iterations * pace
