"""Keep a site's smallest and largest voxels to itself.

Its outermost values are counted farther out than they are.

A histogram of all values begins with the smallest and ends with the largest voxel of single patients. So a site counts
the outermost ten thousandth of its values, at either end, at a round number beyond all of them, no nearer than a
sixteenth of the largest. Sums, and bounds of all values, can still be told from the histogram. The percentiles that all
sites need stay exact, for only between that number and the last value that moved does a rank change:

    values       |      . . :.:::||||||        at all sites together, percentile 0.5 is somewhere:
    as counted   |:.        ..:::||||||        as long as it is not
                  ^^^^^^^^^^^^^^                here, at no site, nothing is different

Every site sees in the bins that are asked for whether one lies in an end of its own. Where that is so (sites whose
intensities hardly overlap), it moves a tenth as many values, and so on, and sends that histogram before it is looked
into. If other bins follow from it, they are asked for in turn. So the outermost values are told only where the
federation computes them, and no more of them than that takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nnunetv2.federated.aggregation import fingerprint_statistics
from nnunetv2.federated.errors import StatisticsError

HIDDEN_SHARE = 10_000
"""One value of so many is counted elsewhere, at either end."""
LEAST_HIDDEN = 10
"""Of few values, at least so many, if that leaves the site's own percentiles unchanged."""
PERCENTILE_SHARE = 400
"""One value of so many is half of those beyond an outer percentile: no more are hidden."""
FEWER = 10
"""By how much fewer are hidden, step by step, where a wanted bin lies at an end."""
MOST_LOOKS = 20
"""How often a site lets the coordinator look into bins: honest ones need one look, seldom two or three."""
CELLS = 8
"""The round numbers are multiples of the next power of two above all absolute values, divided by so many."""


def hidden_of(count: int) -> int:
    """Return how many values at each end of `count` are to be hidden.

    None of a very few.
    """
    return min(max(LEAST_HIDDEN, count // HIDDEN_SHARE), count // PERCENTILE_SHARE)


@dataclass(frozen=True, kw_only=True)
class Channel:
    """The histogram of one channel at one site.

    It knows how many of its outermost values are hidden at either end.
    """

    whole: np.ndarray
    """int64 (65536,): all values where they are."""
    bounds: tuple[int, int] = field(repr=False)
    """The bins of the round numbers beyond all values."""
    lowest: int = 0
    highest: int = 0

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray, *, hide: bool) -> Channel:
        """Count values (float32), each of which occurs so often (int64)."""
        whole = fingerprint_statistics.coarse_histogram(values, counts)
        if not hide or not np.any(values):  # nothing at all, or nothing but zeros: there is no round number
            return cls(whole=whole, bounds=(0, 0))
        hidden = hidden_of(int(whole.sum()))
        return cls(
            whole=whole, bounds=_bins_beyond(float(values.min()), float(values.max())), lowest=hidden, highest=hidden
        )

    def coarse_histogram(self) -> np.ndarray:
        """Return the histogram as it leaves the site."""
        histogram = self.whole.copy()
        histogram -= _first(self.whole, self.lowest)
        histogram -= _first(self.whole[::-1], self.highest)[::-1]
        histogram[self.bounds[0]] += self.lowest
        histogram[self.bounds[1]] += self.highest
        return histogram

    def showing(self, bins: Sequence[int]) -> Channel:
        """Return the channel with fewer values hidden.

        Few enough to change no rank inside these bins.
        """
        channel = self
        while channel.lowest and any(
            channel.bounds[0] <= wanted <= _last_of(self.whole, channel.lowest) for wanted in bins
        ):
            channel = replace(channel, lowest=channel.lowest // FEWER)
        while channel.highest and any(
            fingerprint_statistics.NUM_BINS - 1 - _last_of(self.whole[::-1], channel.highest)
            <= wanted
            <= channel.bounds[1]
            for wanted in bins
        ):
            channel = replace(channel, highest=channel.highest // FEWER)
        return channel

    def check_wanted_bins(self, bins: Sequence[int], others: int) -> None:
        """Raise StatisticsError if a bin asked for can hold no wanted rank.

        Args:
            bins: Those that the coordinator wants to look into.
            others: How many values the other sites may have together.
        """
        cumulative = np.cumsum(self.whole)
        own = int(cumulative[-1])
        ranks = fingerprint_statistics.wanted_ranks(own + others)  # the more there are, the more a bin can hold
        for wanted in bins if own else ():
            upto = int(cumulative[wanted])
            below = upto - int(self.whole[wanted])
            if not any(below <= rank < upto + others for rank in ranks):
                raise StatisticsError(
                    f"the coordinator wants to look into bin {wanted} of the intensities, where none "
                    "of the percentiles of all sites can lie: nothing more is sent. Ask the "
                    "coordinating site which version it runs"
                )


def _first(histogram: np.ndarray, number: int) -> np.ndarray:
    """Return the histogram of the first values of another one."""
    return np.diff(np.minimum(np.cumsum(histogram), number), prepend=0)


def _last_of(histogram: np.ndarray, number: int) -> int:
    """Return the bin of the last of the first values."""
    return int(np.searchsorted(np.cumsum(histogram), number))


def _bins_beyond(smallest: float, largest: float) -> tuple[int, int]:
    """Return the bins of the nearest round numbers that are below and above all values."""
    cell = 2.0 ** math.ceil(math.log2(max(abs(smallest), abs(largest)))) / CELLS
    limit = float(np.finfo(np.float32).max)
    low = max((math.ceil(smallest / cell) - 1) * cell, -limit)
    high = min((math.floor(largest / cell) + 1) * cell, limit)
    first, last = fingerprint_statistics.order_keys(np.array([low, high], np.float32)) >> np.uint32(16)
    return int(first), int(last)
