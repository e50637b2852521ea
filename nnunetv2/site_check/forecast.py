"""Compute how many hours and gigabytes a federation will cost a site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nnunetv2.experiment_planning.summary import format_bytes
from nnunetv2.site_check.findings import Finding
from nnunetv2.utilities.durations import format_duration

SLOW_S = 120.0
"""From so many seconds of transfers per round on, the line is slow: about as long as an epoch takes on a good GPU."""
VALIDATION_COST = 0.4
"""A step of validation, in steps of training."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The cost of one run of training."""

    rounds: int
    update_bytes: int
    """That travel each way per round."""
    transfer_s: float | None = None
    """Per round; None: the line was not measured."""
    training_s: float | None = None
    """Per round; None: no step was measured."""

    @property
    def gigabytes(self) -> float:
        """Return the traffic of all rounds, both ways; one more is for the initial weights."""
        return 2 * (self.rounds + 1) * self.update_bytes / 1e9

    @property
    def hours(self) -> float | None:
        """Return the hours of all rounds, as far as they are known."""
        known = [one for one in (self.transfer_s, self.training_s) if one is not None]
        return self.rounds * sum(known) / 3600 if known else None

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {**asdict(self), "gigabytes": round(self.gigabytes, 2), "hours": self.hours}

    def lines(self) -> Iterator[str]:
        """Yield it for people."""
        yield (
            f"{self.rounds:,} rounds with {format_bytes(self.update_bytes)} each way: "
            f"{format_bytes(1e9 * self.gigabytes)} in all"
        )
        for what, seconds in (("transfers", self.transfer_s), ("training", self.training_s)):
            if seconds is None:
                yield f"{what}: not measured"
            else:
                yield f"{what}: {format_duration(seconds)} per round, {format_duration(seconds * self.rounds)} in all"
        if self.transfer_s is not None and self.training_s is not None:
            together = format_duration((self.transfer_s + self.training_s) * self.rounds)
            yield f"together: about {together}, without waiting for other sites"


def training_seconds(step_s: float, *, num_steps: int, num_validation_steps: int) -> float:
    """Return the seconds of an epoch."""
    return step_s * (num_steps + VALIDATION_COST * num_validation_steps)


def check_speed(forecast: Forecast | None) -> Iterator[Finding]:
    """Warn of a line that would slow all sites down."""
    if forecast is None or forecast.transfer_s is None or forecast.transfer_s < SLOW_S:
        return
    yield Finding(
        area="line",
        name="slow_line",
        state="warning",
        sentence=f"The line is slow: the transfers of a round take {format_duration(forecast.transfer_s)}, those of "
        f"all {forecast.rounds:,} rounds {format_duration(forecast.transfer_s * forecast.rounds)}.",
        remedy="Use a wired line, or ask the coordinating site for --precision float16, which halves the transfers, "
        "or for --quorum and --deadline, so that the others do not wait.",
    )
