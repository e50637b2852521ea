"""The messages of masked sums: masked vectors, survivors, confirmations, shares.

Every sum takes three exchanges; see `privacy/secure_aggregation/protocol.py` for their contents.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from nnunetv2.federated.protocol.messages import Digest, Message, Signature, SiteName, SiteNames

MAX_LANES: Final = 96
MAX_GROUPS: Final = 64
"""Sets of sites that share the same tensors, of which each is a lane."""
LaneName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class MaskedUpdate(Message):
    """The masked vectors of a site.

    Tensors: per lane `masked.<lane>`, U16, U32 or U64; per site of the cohort `envelope.<site>`, U8, that it alone can
    open; `commitments`, U8 of shape (number of seeds, 32).
    """

    kind: Literal["masked_update"] = "masked_update"
    lanes: Annotated[dict[LaneName, Digest], Field(min_length=1, max_length=MAX_LANES)]
    """Lane that is sent -> digest of all that its masks are bound to: cohort, keys, exchange, weights of the start."""


class Survivors(Message):
    """The sites whose masked vectors are there. Tensors: `envelope.<sender>.<receiver>`, of each receiver its own."""

    kind: Literal["survivors"] = "survivors"
    sent: Annotated[dict[LaneName, SiteNames], Field(max_length=MAX_LANES)]
    """Lane -> sites, sorted. None where the operator has abandoned the sum."""


class Confirmation(Message):
    """A site has seen one set of survivors, and will answer for no other one."""

    kind: Literal["confirmation"] = "confirmation"
    digest: Digest
    signature: Signature


class Confirmed(Message):
    """So many sites as unmask have seen the same survivors."""

    kind: Literal["confirmed"] = "confirmed"
    signatures: Annotated[dict[SiteName, Signature], Field(max_length=64)]


class UnmaskingShares(Message):
    """A site's shares of the seeds that the sums still contain.

    Tensor: `shares`, U8 of shape (number of seeds, 32).
    """

    kind: Literal["unmasking_shares"] = "unmasking_shares"
