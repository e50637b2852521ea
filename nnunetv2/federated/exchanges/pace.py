"""Tell from the last rounds of a run how long the others will take."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2.federated.protocol.api import RunState

RECENT_ROUNDS = 10
"""Rounds whose durations tell how long the others will take."""


def typical_duration(closed_at: Sequence[float]) -> float | None:
    """Return the median of the seconds from each closing to the next.

    None if there are fewer than two.
    """
    if len(closed_at) < 2:
        return None
    return statistics.median(late - early for early, late in itertools.pairwise(closed_at))


def time_left(num_rounds: int, round_s: float, elapsed_s: float) -> float:
    """Return the seconds that rounds will take, the first of which is under way."""
    return num_rounds * round_s - min(elapsed_s, round_s)


def seconds_left(state: RunState, *, round_s: float | None, last_closed: float | None, now: float) -> float | None:
    """Return how long a run goes on if its rounds take as long as before.

    None if that cannot be known, or the run stands still.
    """
    if round_s is None or state.num_rounds is None or last_closed is None or state.state != "running":
        return None
    return time_left(state.num_rounds - state.rounds_closed, round_s, max(0.0, now - last_closed))
