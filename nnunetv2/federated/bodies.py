"""Every message that travels as a plain JSON body, as models of protocol 1."""
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nnunetv2.federated.messages import (
    MAX_SITES,
    PROTOCOL,
    Count,
    Digest,
    Finite,
    LongText,
    Part,
    Positive,
    SiteName,
    SiteNames,
    Text,
)


class FederationSettings(Part):
    """What holds for every site of a federation, fixed when it was created."""

    federation: Text
    sites: SiteNames
    matching: Literal["name", "resolution"] = "name"
    weighting: Literal["cases", "uniform"] = "cases"
    num_epochs: Annotated[int, Field(ge=1, le=10**7)] | None = None
    num_iterations_per_epoch: Annotated[int, Field(ge=1, le=10**7)] | None = None
    num_val_iterations_per_epoch: Annotated[int, Field(ge=1, le=10**7)] | None = None
    quorum: Annotated[int, Field(ge=1, le=MAX_SITES)] | None = None
    """Smallest number of sites with which a round may close at its deadline. None: all of them."""
    deadline_s: Positive | None = None
    """Seconds after its first contribution at which a round closes with its quorum. None: it waits."""


class JoinRequest(Part):
    protocol: Literal[1] = PROTOCOL
    invitation: Annotated[str, Field(min_length=1, max_length=500)]
    token: Annotated[str, Field(min_length=16, max_length=500)]
    """The secret that the site has made for itself and stored before asking."""


class JoinAnswer(Part):
    protocol: Literal[1] = PROTOCOL
    federation: Text
    site: SiteName
    settings: FederationSettings


class Offer(Part):
    """What a site is about to contribute. The answer may spare it the upload."""

    digest: Digest
    size: Count
    """Bytes."""


class Receipt(Part):
    """A contribution is durably stored."""

    digest: Digest
    """SHA-256 of the stored contribution, which is an earlier one where `already` is true."""
    already: bool = False
    waiting_for: SiteNames = ()


class Waiting(Part):
    waiting_for: SiteNames


class Problem(Part):
    """Why a request failed."""

    code: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    message: LongText
    remedy: LongText = ""


class RunState(Part):
    """How far a run of training has come."""

    run: Text
    registered: SiteNames = ()
    open_round: Count | None = None
    """The round that takes updates now; None before the initial weights are known and after the last round."""
    num_rounds: Count | None = None
    closed: bool = False


class FailureReport(Part):
    """A site cannot go on, and says so instead of sending old weights."""

    run: Text
    round: Count | None = None
    reason: LongText


class SiteStatus(Part):
    site: SiteName
    joined: bool
    last_seen: Finite | None = None
    """Seconds since 1970, by the coordinator's clock."""
    bytes_received: Count = 0
    bytes_sent: Count = 0


class GatheringStatus(Part):
    key: Text
    contributed: SiteNames
    waiting_for: SiteNames
    opened: Finite
    """Seconds since 1970, by the coordinator's clock."""


class FailureStatus(Part):
    site: SiteName
    run: Text
    round: Count | None
    reason: LongText
    time: Finite


class TrafficStatus(Part):
    """What one site and the coordinator have sent each other for one gathering."""

    site: SiteName
    key: Text
    bytes_received: Count
    """Bytes that the coordinator received."""
    bytes_sent: Count


class Status(Part):
    """What the federation is doing, for people to look at."""

    federation: Text
    sites: Annotated[tuple[SiteStatus, ...], Field(max_length=MAX_SITES)]
    waiting: Annotated[tuple[GatheringStatus, ...], Field(max_length=10_000)] = ()
    runs: Annotated[tuple[RunState, ...], Field(max_length=10_000)] = ()
    failures: Annotated[tuple[FailureStatus, ...], Field(max_length=10_000)] = ()
    traffic: Annotated[tuple[TrafficStatus, ...], Field(max_length=10_000)] = ()
    """Of the gatherings that were busy last."""
