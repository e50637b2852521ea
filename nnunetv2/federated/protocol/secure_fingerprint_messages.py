"""The messages that say which statistics a secure federation adds up next."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nnunetv2.federated.protocol.messages import MAX_CHANNELS, BinList, Count, Finite, Message, Part

Geometry = Literal["list", "quantiles"]
"""How a secure federation tells of spacings and shapes: of every case, without saying whose, or by order statistics."""
StatisticName = Annotated[str, Field(max_length=64)]


class Steps(Part):
    """The whole numbers that stand for the intensities of a channel, see `aggregation/integer_moments.py`."""

    pivot: Finite
    exponent: Annotated[int, Field(ge=-100, le=300)]


class Branch(Part):
    """Numbers whose float64 begin with the same bits, see `aggregation/order_statistics.py`."""

    prefix: Annotated[int, Field(ge=0, lt=2**64)]
    """These bits: 16 for each level."""
    below: Count
    """How many numbers are smaller than all of them."""


class CoarseHistograms(Part):
    """Asks how many intensities of each channel lie in each of 65536 bins."""

    what: Literal["coarse"] = "coarse"


class FineHistograms(Part):
    """Asks for the insides of some of these bins, and for sums of all intensities."""

    what: Literal["fine"] = "fine"
    bins: Annotated[tuple[BinList, ...], Field(min_length=1, max_length=MAX_CHANNELS)]
    """Per channel."""
    steps: Annotated[tuple[Steps, ...], Field(min_length=1, max_length=MAX_CHANNELS)]

    @model_validator(mode="after")
    def _lengths_agree(self) -> FineHistograms:
        if len(self.bins) != len(self.steps):
            raise ValueError("bins and steps must have one entry per channel")
        return self


class CaseTable(Part):
    """Asks for spacing, shape and relative size of the cases, as a table, see `aggregation/case_table.py`."""

    what: Literal["cases"] = "cases"
    doublings: Annotated[int, Field(ge=0, le=6)] = 0
    """How often the table was too small."""


class DigitCounts(Part):
    """Asks how many numbers behind some bits have which bits next."""

    what: Literal["digits"] = "digits"
    level: Annotated[int, Field(ge=0, le=3)]
    branches: Annotated[
        tuple[Annotated[tuple[Branch, ...], Field(min_length=1, max_length=4)], ...], Field(min_length=3, max_length=7)
    ]
    """Per quantity. Seven: spacings, shapes, relative size. Three: shapes at the target spacing."""


class NextSum(Message):
    """The next sum of a secure federation: one vector of 64-bit words per site."""

    kind: Literal["next_sum"] = "next_sum"
    question: Annotated[CoarseHistograms | FineHistograms | CaseTable | DigitCounts, Field(discriminator="what")]
    intensities: Annotated[tuple[dict[StatisticName, Finite], ...], Field(max_length=MAX_CHANNELS)] = ()
    """Statistics of all sites per channel, once they are known."""


class ResampledShape(Message):
    """The median shape of all sites' cases at the target spacing of some plans."""

    kind: Literal["resampled_shape"] = "resampled_shape"
    median: Annotated[tuple[Annotated[Finite, Field(ge=0)], ...], Field(min_length=3, max_length=3)]
