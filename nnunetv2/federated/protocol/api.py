"""Every message that travels as a plain JSON body, as models of protocol 1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nnunetv2.federated.errors import FederationError
from nnunetv2.federated.protocol.messages import (
    MAX_SITES,
    PROTOCOL,
    Count,
    Digest,
    Finite,
    LongText,
    Networks,
    Part,
    Positive,
    PrivacyDeclaration,
    PublicKey,
    Segment,
    SiteName,
    SiteNames,
    Text,
    WithAdditions,
    WithPrecision,
)
from nnunetv2.federated.protocol.rounds import Rounds
from nnunetv2.utilities.plain_text import printable

ShownText = Annotated[LongText, AfterValidator(lambda text: printable(text, most=8000))]
"""Text for people that others may have written: printable once it was read."""

LEAST_SITES = 2
"""A sum over one site would be that site's own data."""
MinSites = Annotated[int, Field(ge=LEAST_SITES, le=MAX_SITES)]


class Secure(Part):
    """The settings of a federation that masks updates and statistics."""

    k: Annotated[int, Field(ge=3, le=64)] = 3
    """No sum has fewer sites."""
    geometry: Literal["list", "quantiles"] = "list"
    """Form in which shapes and spacings are told: a list of all cases that names nobody, or order statistics only."""


class FederationSettings(WithPrecision):
    """Settings that hold for every site, fixed when the federation was created."""

    ADDED = (
        "precision",
        "exchange_every",
        "min_sites",
        "secure",
        "proximal",
        "keep_local",
        "finetune_epochs",
        "initial_weights",
        "networks",
        "labels",
    )

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
    late_updates: Literal["drop", "carry"] = "drop"
    """An update that comes after its round was closed does not count, or counts in the round that is open then."""
    validate_every: Annotated[int, Field(ge=0, le=10**7)] = 5
    """The aggregates of every so many rounds, and of the last one, are validated at the sites. 0: never."""
    min_sites: MinSites = LEAST_SITES
    """Nothing is pooled or averaged over fewer sites: no statistics, no round, no tensor, no validation."""
    secure: Secure | None = None
    """Set where updates and statistics are masked, so that only their sums can be seen."""
    proximal: Positive | None = None
    """Strength of the proximal term that keeps a site's weights near those of its round. None: there is none."""
    keep_local: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*?\[\]!-]{1,200}$")] | None = None
    """Tensors that sites send but keep their own of: norm, head, or names with wildcards. None: none."""
    finetune_epochs: Annotated[int, Field(ge=0, le=10**7)] = 0
    """Epochs for which each site trains on alone, after the last round."""
    initial_weights: Digest | None = None
    """SHA-256 of the checkpoint from which all sites start. None: from random weights, or those that sites give."""
    networks: Networks = "equal"
    """Whether all sites plan the same network, or each its own from the pooled fingerprint."""
    labels: Literal["equal", "union"] = "equal"
    """All sites annotate the same classes, or each some of those that all have together."""

    @property
    def num_rounds(self) -> int | None:
        """Return the number of rounds of every run; None where the trainers decide."""
        return None if self.num_epochs is None else Rounds(self.exchange_every).count(self.num_epochs)


def describe_methods(settings: FederationSettings) -> tuple[str, ...]:
    """Describe the methods of the sites beside plain averaging, a line each."""
    lines = []
    if settings.networks == "own":
        lines.append(f"Each site has a network of its own; what matches by {settings.matching} is averaged")
    if settings.proximal is not None:
        lines.append(f"Proximal term of strength {settings.proximal:g} towards the weights of the round")
    if settings.keep_local is not None:
        lines.append(f"Sites keep their own tensors of {settings.keep_local}, whose average is for the common model")
    if settings.finetune_epochs:
        lines.append(f"After the last round, each site trains on alone for {settings.finetune_epochs} epochs")
    if settings.labels == "union":
        lines.append("Sites may annotate different classes; the network tells those of all sites apart")
    if settings.initial_weights is not None:
        lines.append(f"All sites start from weights of the operator, SHA-256 {settings.initial_weights[:12]}...")
    return tuple(lines)


def check_rounds(settings: FederationSettings) -> None:
    """Raise FederationError if a round is longer than the training."""
    if settings.num_epochs is not None and settings.exchange_every > settings.num_epochs:
        raise FederationError(
            f"--exchange-every {settings.exchange_every} is more than the {settings.num_epochs} epochs: choose "
            f"{settings.num_epochs} or less, or more --epochs"
        )


def check_floor(settings: FederationSettings) -> None:
    """Raise FederationError if the smallest number of sites contradicts the other settings."""
    if settings.min_sites > len(settings.sites):
        raise FederationError(
            f"--min-sites {settings.min_sites} is more than the {len(settings.sites)} sites: nothing "
            "could ever be averaged"
        )
    if settings.quorum is not None and settings.quorum < settings.min_sites:
        raise FederationError(
            f"--quorum {settings.quorum} is less than --min-sites {settings.min_sites}, with fewer "
            f"than which no round is closed: choose a quorum of {settings.min_sites} or more"
        )


def check_quorum(settings: FederationSettings) -> None:
    """Raise FederationError if quorum or deadline make no sense.

    No round could ever close, or the deadline would change nothing.
    """
    if settings.quorum is not None and settings.quorum > len(settings.sites):
        raise FederationError(f"--quorum {settings.quorum} is more than the {len(settings.sites)} sites")
    if settings.quorum is not None and settings.deadline_s is None:
        raise FederationError("--quorum needs --deadline: without one, a round waits for all sites")
    if settings.deadline_s is not None and settings.quorum is None:
        raise FederationError(
            "--deadline needs --quorum: without one, a round waits for all sites, however late they are"
        )


def check_late_updates(settings: FederationSettings) -> None:
    """Raise FederationError if updates are to be carried although no round closes before they come."""
    if settings.late_updates == "carry" and settings.deadline_s is None:
        raise FederationError(
            "--late-updates carry needs --quorum and --deadline: without them no update is late, "
            "since every round waits for all sites"
        )


def check_finetuning(settings: FederationSettings) -> None:
    """Raise FederationError if sites are to train on longer than their schedule is."""
    if settings.num_epochs is not None and settings.finetune_epochs > settings.num_epochs:
        raise FederationError(
            f"--finetune-epochs {settings.finetune_epochs} is more than the {settings.num_epochs} epochs of a run, "
            "whose last learning rates they have once more"
        )


class SettingsChange(Part):
    """A change of settings while a federation is at work.

    Fields that are not given stay.
    """

    quorum: Annotated[int, Field(ge=1, le=MAX_SITES)] | None = None
    deadline_s: Positive | None = None
    late_updates: Literal["drop", "carry"] = "drop"
    validate_every: Annotated[int, Field(ge=0, le=10**7)] = 5
    min_sites: MinSites = LEAST_SITES
    """May be raised, never lowered: sites have joined with that promise."""


class InviteRequest(Part):
    """An operator invites somebody."""

    name: SiteName
    role: Literal["site", "observer", "operator"] = "site"
    lifetime_s: Annotated[float, Field(gt=0, le=366 * 86_400)] = 14 * 86_400.0


class InviteAnswer(Part):
    """An invitation, as the one word that the member types."""

    name: SiteName
    role: Literal["site", "observer", "operator"]
    invitation: LongText
    """Empty for a site that an engine knows: it takes part again without one."""
    expires: Finite


class JoinRequest(WithAdditions):
    ADDED = ("identity",)

    protocol: Literal[1] = PROTOCOL
    invitation: Annotated[str, Field(min_length=1, max_length=500)]
    token: Annotated[str, Field(min_length=16, max_length=500)]
    """The secret that the site has made for itself and stored before asking."""
    identity: PublicKey | None = None
    """Public part of the key that the site signs with, where the federation aggregates securely."""


class JoinAnswer(Part):
    protocol: Literal[1] = PROTOCOL
    federation: Text
    site: SiteName
    """Name of the member, which may be an observer or an operator too."""
    role: Literal["site", "observer", "operator"] = "site"
    settings: FederationSettings


class Roster(Part):
    """The identities of the sites that have joined, as the coordinator tells them."""

    sites: Annotated[dict[SiteName, PublicKey], Field(max_length=MAX_SITES)]


class Offer(Part):
    """An announced contribution.

    The answer may spare the upload.
    """

    digest: Digest
    size: Count
    """Bytes."""


class Wanted(Part):
    """The document that was offered is wanted."""

    offset: Count = 0
    """How many bytes of it have arrived already."""


LARGEST_REHEARSAL = 512 << 20
"""Bytes that a rehearsal may have. Weights of nnU-Net have about 120 MB, of its largest presets 400."""


class Rehearsed(Part):
    """A rehearsal has arrived, and nothing of it was kept."""

    digest: Digest
    size: Count
    """Bytes."""


class Receipt(Part):
    """A contribution is durably stored."""

    digest: Digest
    """SHA-256 of the stored contribution, which is an earlier one where `already` is true."""
    already: bool = False
    key: Text = ""
    """The exchange in which it counts, where that is not the one it was sent to: a late update can count in the next
    round."""
    waiting_for: SiteNames = ()


LACKS_HEADER = "X-Sites-Lacking"
"""Where `Waiting.lacks` travels."""


class Waiting(Part):
    waiting_for: SiteNames
    paused: bool = False
    """Whether the operator has paused the run."""
    lacks: Annotated[Count, Field(exclude=True)] = 0
    """How many further sites it takes although nobody in particular is waited for. Travels as a header: an older site
    would refuse the field, and its training end."""


class Problem(Part):
    """Why a request failed."""

    code: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    message: ShownText
    remedy: ShownText = ""


class RunState(Part):
    """The progress of a run of training."""

    run: Text
    registered: SiteNames = ()
    open_round: Count | None = None
    """The round that takes updates now; None before the initial weights are known and after the last round."""
    num_rounds: Count | None = None
    closed: bool = False
    """Whether there will be no more rounds: the run is complete, or the operator has stopped it."""
    state: Literal["running", "paused", "stopped", "complete"] = "running"
    rounds_closed: Count = 0
    members: SiteNames = ()
    """Sites that take part in its rounds now; empty before the registration is closed."""
    left: SiteNames = ()


class NetworkOutlook(Part):
    """One of the networks of a run whose sites have their own."""

    name: Segment
    """The name that the plans of its common model have."""
    description: Text
    """Its kind and size."""
    sites: SiteNames
    trainer: Text = ""
    """Class that builds it; empty where there will be no common model of it."""
    obstacle: LongText = ""
    """Why there will be none."""


class RunOutlook(WithAdditions):
    """The foreseen averages of a run, known once its sites have registered."""

    ADDED = ("networks", "coverage")

    run: Text
    trainer: Text = ""
    """Class that builds the network of the common model; empty where there will be none."""
    obstacle: LongText = ""
    """Why there will be no common model."""
    networks: Annotated[tuple[NetworkOutlook, ...], Field(max_length=MAX_SITES)] = ()
    """All of them, where sites have networks of their own: there is a common model of each that is shared whole."""
    coverage: Annotated[dict[SiteName, tuple[Count, Count]], Field(max_length=MAX_SITES)] = {}
    """There, too: site -> (parameters it shares, parameters it has)."""


class Outlooks(Part):
    """The foreseen averages of every run whose sites have registered.

    An answer of its own: sites that do not know it yet do not ask, and could not read it as part of another.
    """

    runs: Annotated[tuple[RunOutlook, ...], Field(max_length=10_000)] = ()


class RunPrivacy(Part):
    """The differential privacy that the sites of a run have declared."""

    run: Text
    sites: Annotated[dict[SiteName, PrivacyDeclaration | None], Field(max_length=MAX_SITES)]
    """None: without differential privacy."""


class DeclaredPrivacy(Part):
    """The runs in which some site has declared differential privacy.

    An answer of its own, for the same reason as `Outlooks`.
    """

    runs: Annotated[tuple[RunPrivacy, ...], Field(max_length=10_000)] = ()


class FailureReport(Part):
    """A site cannot go on, and says so instead of sending old weights."""

    run: Text
    round: Count | None = None
    reason: LongText


class RunAction(Part):
    """A wish of an operator for a run, or of a site for itself."""

    action: Literal["pause", "resume", "stop", "reset", "proceed", "abandon", "leave", "return"]
    gathering: Text | None = None
    """The exchange to close with the contributions so far, for `proceed`."""


class SiteStatus(Part):
    site: SiteName
    joined: bool
    state: Literal["invited", "active", "revoked"] = "invited"
    last_seen: Finite | None = None
    """Seconds since 1970, by the coordinator's clock."""
    bytes_received: Count = 0
    bytes_sent: Count = 0


class GatheringStatus(WithAdditions):
    ADDED = ("lacks",)

    key: Text
    contributed: SiteNames
    waiting_for: SiteNames
    opened: Finite
    """Seconds since 1970, by the coordinator's clock."""
    refusal: ShownText = ""
    """Why there is no result although all have contributed."""
    lacks: Count = 0
    """How many further sites have to contribute before it may be closed, whoever is waited for: `min_sites` says so."""


class FailureStatus(Part):
    site: SiteName
    run: Text
    round: Count | None
    reason: ShownText
    time: Finite


class TrafficStatus(Part):
    """The bytes of one site and the coordinator for one exchange."""

    site: SiteName
    key: Text
    bytes_received: Count
    """Bytes that the coordinator received."""
    bytes_sent: Count


class ValidationStatus(Part):
    """The scores of a run's last validated aggregate on the data of all sites."""

    round: Count
    dice: Annotated[tuple[Finite | None, ...], Field(max_length=10_000)]
    """Per class or region."""
    mean_dice: Finite | None
    ema_dice: Finite | None
    best_round: Count | None
    best_ema_dice: Finite | None


class RunProgress(Part):
    """The pace and the scores of a run."""

    run: Text
    last_closed: Finite | None = None
    """When its last round was closed; seconds since 1970, by the coordinator's clock."""
    round_s: Finite | None = None
    """Median seconds from one closing to the next, of the last rounds."""
    validation: ValidationStatus | None = None


class Status(Part):
    """The state of a federation, for people to look at."""

    federation: Text
    time: Finite = 0.0
    """Seconds since 1970, by the coordinator's clock."""
    sites: Annotated[tuple[SiteStatus, ...], Field(max_length=MAX_SITES)]
    waiting: Annotated[tuple[GatheringStatus, ...], Field(max_length=10_000)] = ()
    runs: Annotated[tuple[RunState, ...], Field(max_length=10_000)] = ()
    progress: Annotated[tuple[RunProgress, ...], Field(max_length=10_000)] = ()
    """Of the same runs."""
    failures: Annotated[tuple[FailureStatus, ...], Field(max_length=10_000)] = ()
    traffic: Annotated[tuple[TrafficStatus, ...], Field(max_length=10_000)] = ()
    """Of the exchanges that were busy last."""
