"""The messages that travel in documents, as self-checking models of protocol 1.

Each model is frozen, refuses unknown fields, and bounds every list and text, so that a parsed message is
small and finite. `api.py` has the messages that travel as plain JSON, `document.py` the bytes, `keys.py` where they go.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Name = TypeVar("Name", str, int)

PROTOCOL: Final = 1
MAX_SITES = 1000
MAX_CASES = 100_000
MAX_CHANNELS = 256
MAX_LABELS = 10_000
MAX_TENSORS = 20_000
MAX_METRICS = 64
"""Figures of one round of one site, by name,"""
MAX_METRIC_NUMBERS = 2000
"""and the numbers in them. They stay with the coordinator for good: these are some 60 KB as JSON."""
MAX_LISTED = 1000
"""Numbers of one figure: one per class or region."""
MAX_DOCUMENT_JSON = 32 << 20
"""Characters of plans or of a pooled fingerprint, written as JSON."""

SITE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
TENSOR_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.#-]{0,254}$"
METRIC_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
LOCAL_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,159}$"
"""A site's own name of a tensor. Canonical names may be longer: matching appends "#" and a shape."""
SEGMENT_PATTERN = r"^[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,127}$"
DIGEST_PATTERN = r"^[0-9a-f]{64}$"


# ---------------------------------------------------------------------------------------------- building blocks
def _null_unless_finite(value: Any) -> Any:
    """Turn NaN and infinities, which JSON cannot carry, into None; inside lists too."""
    if isinstance(value, list | tuple):
        return [_null_unless_finite(item) for item in value]
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        value = value.item()  # a numpy scalar
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Refuse JSON that is not finite or that is larger than any plans file."""
    text = json.dumps(value, allow_nan=False)
    if len(text) > MAX_DOCUMENT_JSON:
        raise ValueError(f"holds {len(text)} characters of JSON, at most {MAX_DOCUMENT_JSON} are allowed")
    return value


def _check_numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Refuse more numbers than a round can have for people to look at."""
    found = sum(len(value) if isinstance(value, list) else 1 for value in metrics.values())
    if found > MAX_METRIC_NUMBERS:
        raise ValueError(f"holds {found} numbers, at most {MAX_METRIC_NUMBERS} are allowed")
    return metrics


def _at_most(most: int) -> BeforeValidator:
    """Refuse longer dictionaries before their entries are looked at: every fault found there takes memory."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"has {len(value)} entries, at most {most} are allowed")
        if isinstance(value, dict):  # once through Python, values are not JSON any more, to which a list is a tuple
            return {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
        return value

    return BeforeValidator(check)


def _check_aliases(aliases: Any) -> Any:
    """Refuse at the first name that is none, rather than to collect all of them."""
    if isinstance(aliases, dict):
        for name in (*aliases, *aliases.values()):
            if not isinstance(name, str) or not re.fullmatch(LOCAL_NAME_PATTERN.strip("^$"), name):
                raise ValueError(f"{name!r:.80} is no name of a tensor")
    return aliases


def _check_unique(names: tuple[Name, ...]) -> tuple[Name, ...]:
    if len(set(names)) != len(names):
        raise ValueError("names are repeated")
    return names


SiteName = Annotated[str, Field(pattern=SITE_PATTERN)]
LocalName = Annotated[str, Field(pattern=LOCAL_NAME_PATTERN)]
TensorName = Annotated[str, Field(pattern=TENSOR_NAME_PATTERN)]
Segment = Annotated[str, Field(pattern=SEGMENT_PATTERN)]
Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
PublicKey = Annotated[str, Field(pattern=DIGEST_PATTERN)]
"""32 bytes in hexadecimal: of Ed25519 or X25519."""
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
"""Of Ed25519, in hexadecimal."""
Text = Annotated[str, Field(max_length=500)]
LongText = Annotated[str, Field(max_length=8000)]
LARGEST_COUNT = 2**62
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Label = Annotated[int, Field(ge=-(2**31), le=2**31)]
LabelList = Annotated[tuple[Label, ...], Field(min_length=1, max_length=MAX_LABELS)]
Labels = Annotated[dict[Text, Label | LabelList], Field(min_length=1, max_length=MAX_LABELS), _at_most(MAX_LABELS)]
ChannelNames = Annotated[dict[Text, Text], Field(min_length=1, max_length=MAX_CHANNELS), _at_most(MAX_CHANNELS)]
Spacing = tuple[Positive, Positive, Positive]
Shape = tuple[
    Annotated[int, Field(ge=1, le=2**31)], Annotated[int, Field(ge=1, le=2**31)], Annotated[int, Field(ge=1, le=2**31)]
]
JsonObject = Annotated[dict[str, JsonValue], AfterValidator(_check_json)]
Metric = Annotated[
    Finite | Annotated[list[Finite | None], Field(max_length=MAX_LISTED)] | None, BeforeValidator(_null_unless_finite)
]
Metrics = Annotated[
    dict[Annotated[str, Field(pattern=METRIC_NAME_PATTERN)], Metric],
    Field(max_length=MAX_METRICS),
    AfterValidator(_check_numbers),
]
"""Trainers send train_losses, val_losses, mean_fg_dice and dice_per_class_or_region; others are kept like these."""
SiteNames = Annotated[tuple[SiteName, ...], Field(max_length=MAX_SITES), AfterValidator(_check_unique)]
VoxelCounts = Annotated[
    tuple[Annotated[Finite, Field(ge=0, le=2**53)], ...],  # their sums stay finite
    Field(min_length=1, max_length=MAX_LABELS),
    FailFast(),
]
OneOfSite = Annotated[dict[SiteName, Positive], Field(max_length=MAX_SITES)]
"""The sites that take part, each with a 1. Before 2.8.1+fed.3, it was the weight of each: so every site knew how many
cases the others have, which the coordinator now keeps to itself."""
Precision = Literal["float32", "float16", "int8"]
"""How weights travel in the rounds of a run."""
Networks = Literal["equal", "own"]
"""Whether all sites plan the same network, or each its own."""
BinList = Annotated[tuple[Annotated[int, Field(ge=0, lt=65536)], ...], Field(max_length=6)]


class Part(BaseModel):
    """Base of everything here: frozen, and without room for fields nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Message(Part):
    """Base of the messages that a document can carry.

    Children give `kind` one value, by which documents know them.
    """

    protocol: Literal[1] = PROTOCOL
    if TYPE_CHECKING:
        kind: str  # a field of the children only: here, it would come before those of their other bases as JSON

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        _MESSAGES[cls.model_fields["kind"].default] = cls


_MESSAGES: dict[str, type[Message]] = {}


def document_messages() -> tuple[type[Message], ...]:
    """Return every message that a document can carry.

    Those of this module, and of steps that have their own.
    """
    return tuple(_MESSAGES.values())


class SignedKey(Part):
    """A site's key for agreeing on masks, signed by its identity."""

    identity: PublicKey
    """Ed25519."""
    exchange_key: PublicKey
    """X25519, made for one run or one pooling of fingerprints."""
    signature: Signature
    """Over federation, gathering and key; see `privacy/identities.py`."""


class WithAdditions(Part):
    """Base of models that have got fields since protocol 1 began.

    These are left out while they have their default.
    """

    ADDED: ClassVar[tuple[str, ...]] = ()
    """Names of these fields. A peer that does not know them yet follows their defaults."""

    @model_serializer(mode="wrap")
    def _leave_defaults_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields, added = type(self).model_fields, self.ADDED
        return {
            name: value
            for name, value in serialize(self).items()
            if name not in added or getattr(self, name) != fields[name].default
        }


class WithPrecision(WithAdditions):
    """Base of models that say how weights travel, and how often."""

    ADDED: ClassVar[tuple[str, ...]] = ("precision", "exchange_every")

    precision: Precision = "float32"
    """float16 and int8 are sent with error feedback, see `aggregation/codecs`."""
    exchange_every: Annotated[int, Field(ge=1, le=10**7)] = 1
    """Epochs of a round, after which weights travel; the last round may have fewer."""


# ---------------------------------------------------------------------------------------- fingerprint and plans
class Census(WithAdditions, Message):
    """The parts of a dataset that must agree between sites before pooling.

    And how many cases one of them has.
    """

    ADDED = ("keys",)

    kind: Literal["census"] = "census"
    num_cases: Annotated[int, Field(ge=1, le=MAX_CASES)]
    channel_names: ChannelNames
    labels: Labels
    regions_class_order: LabelList | None = None
    share_extrema: bool = False
    keys: SignedKey | None = None
    """With which this site masks, where the federation adds up masked statistics."""


class PooledCensus(WithAdditions, Message):
    """The number of cases of all sites together.

    The number of sampled voxels per case follows from it.
    """

    ADDED = ("keys", "labels", "annotators")

    kind: Literal["pooled_census"] = "pooled_census"
    num_cases: Annotated[int, Field(ge=1, le=MAX_CASES * MAX_SITES)]
    keys: Annotated[dict[SiteName, SignedKey], Field(max_length=MAX_SITES)] = {}
    """Of all sites, where their statistics are masked."""
    labels: Labels | None = None
    """The classes of all sites together and their common numbers, where sites may annotate different ones."""
    annotators: Annotated[dict[Text, Count], Field(max_length=MAX_LABELS), _at_most(MAX_LABELS)] = {}
    """Class -> how many sites annotate it, of these."""


class ChannelMoments(Part):
    """Number of voxels, their mean, and the sum of their squared deviations from it."""

    count: Count
    mean: Finite
    m2: Annotated[Finite, Field(ge=0)]


class CoarseSummary(Message):
    """One site's geometry and moments; its tensors `coarse.<channel>` are int64 histograms of shape (65536,)."""

    kind: Literal["coarse_summary"] = "coarse_summary"
    spacings: Annotated[tuple[Spacing, ...], Field(min_length=1, max_length=MAX_CASES), FailFast()]
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1, max_length=MAX_CASES), FailFast()]
    """Sorted together with `spacings`: entry i of both belongs to one case, but not to the i-th of the site."""
    relative_sizes: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=MAX_CASES), FailFast()]
    moments: Annotated[tuple[ChannelMoments, ...], Field(min_length=1, max_length=MAX_CHANNELS), FailFast()]
    promotes_to_float64: bool
    """Whether some case has no foreground: then nnU-Net computes in float64 (specification 01, 4.2)."""
    extrema: Annotated[tuple[tuple[Finite, Finite], ...], Field(max_length=MAX_CHANNELS)] | None = None
    """(smallest, largest) voxel per channel, only where the site chose to share them."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> CoarseSummary:
        if not len(self.spacings) == len(self.shapes) == len(self.relative_sizes):
            raise ValueError("spacings, shapes and relative_sizes must have one entry per case")
        if self.extrema is not None and len(self.extrema) != len(self.moments):
            raise ValueError("extrema and moments must have one entry per channel")
        return self


class WantedBins(Message):
    """Per channel, the bins of the pooled coarse histogram whose insides decide the percentiles."""

    kind: Literal["wanted_bins"] = "wanted_bins"
    bins: Annotated[tuple[BinList, ...], Field(min_length=1, max_length=MAX_CHANNELS)]


class FineSummary(WithAdditions, Message):
    """The bins a site looked into.

    Its tensors `fine.<channel>` are int64 of shape (number of bins, 65536).
    """

    ADDED = ("corrected",)

    kind: Literal["fine_summary"] = "fine_summary"
    bins: Annotated[tuple[BinList, ...], Field(min_length=1, max_length=MAX_CHANNELS)]
    corrected: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=MAX_CHANNELS)], ...],
        Field(max_length=MAX_CHANNELS),
        AfterValidator(_check_unique),
    ] = ()
    """Channels whose coarse histograms come again, as tensors `coarse.<channel>`: a wanted bin lies among the
    outermost values of the site, fewer of which are counted elsewhere now; see `outermost`."""


class PooledFingerprint(Message):
    """The content of dataset_fingerprint.json that one centre holding all cases would have written."""

    kind: Literal["pooled_fingerprint"] = "pooled_fingerprint"
    num_cases: Annotated[int, Field(ge=1, le=MAX_CASES * MAX_SITES)]
    fingerprint: JsonObject


class PlansReport(Message):
    """The plans that a site arrived at."""

    kind: Literal["plans_report"] = "plans_report"
    plans: JsonObject


class PlansAgreement(Message):
    """All sites hold the same plans: their digest."""

    kind: Literal["plans_agreement"] = "plans_agreement"
    digest: Digest


# ---------------------------------------------------------------------------------------------------- training
class TensorEntry(WithAdditions):
    """One tensor of a site's network, by its own name there."""

    ADDED = ("only_received",)

    name: LocalName
    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31)], ...], Field(max_length=8)]
    only_received: Literal[True] | None = None
    """Set where the site cannot train it, and receives it from others: a class that it does not annotate."""


class TrainingData(WithAdditions):
    """The parts of dataset.json that must agree, or that are needed to use the model."""

    ADDED = ("annotated_labels",)

    channel_names: ChannelNames
    labels: Labels
    regions_class_order: LabelList | None = None
    file_ending: Annotated[str, Field(max_length=32)]
    annotated_labels: (
        Annotated[tuple[Text, ...], Field(max_length=MAX_LABELS), AfterValidator(_check_unique)] | None
    ) = None
    """Those of the labels that this site annotates, where sites may annotate different ones."""

    @property
    def annotated_values(self) -> tuple[int, ...]:
        """Return the foreground labels among them, ascending."""
        values = {self.labels[name] for name in self.annotated_labels or () if name not in ("background", "ignore")}
        return tuple(sorted(value for value in values if isinstance(value, int)))


class PrivacyDeclaration(Part):
    """A site's account of its training's differential privacy.

    It is declared: nobody else can check it.
    """

    unit: Literal["patient", "scan"]
    """Whose adding or removing epsilon and delta are about. A scan, where the site does not say whose it is."""
    epsilon: Positive
    """To which everything that the site has trained with these patients will bring them, at most."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    sigma: Positive
    """Noise multiplier, as planned when the training began."""
    lot: Annotated[int, Field(ge=1, le=MAX_CASES)]
    """Patients per step, on average."""
    clip: Positive
    """Largest norm of one patient's gradient."""
    steps: Annotated[int, Field(ge=1, le=2**62)]
    """Of the whole training."""
    accountant: Text
    """The library that computed epsilon, and its version."""
    uncovered: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
    """Outcomes from the same patients that epsilon does not cover, such as plans."""


NEW_IN_REGISTRATION = ("network_trainer", "architecture", "pretrained_weights", "keys", "trust", "privacy")
"""Fields that versions before 2.8.1+fed.4 do not know. They travel only where there is something to say."""


class Registration(Message):
    """The training that a site is about to begin."""

    kind: Literal["registration"] = "registration"
    configuration: Segment
    fold: Annotated[str, Field(pattern=r"^(all|[0-9]{1,4})$")]
    trainer: Segment
    num_training_cases: Annotated[int, Field(ge=1, le=MAX_CASES)]
    plans: JsonObject
    dataset_json: TrainingData
    mirroring_axes: Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], Field(max_length=3)] | None = None
    requires_equal_plans: bool
    tensors: Annotated[tuple[TensorEntry, ...], Field(min_length=1, max_length=MAX_TENSORS), FailFast()]
    """The distinct tensors of the network, under the first of their names."""
    aliases: Annotated[
        dict[LocalName, LocalName], Field(max_length=4 * MAX_TENSORS), BeforeValidator(_check_aliases)
    ] = {}
    """Further names of these tensors: alias -> name in `tensors`."""
    network_trainer: Segment | None = None
    """Class whose method builds the network, for those who predict. None: `trainer`, or nnUNetTrainer where that is one
    of the package's own federated trainers."""
    architecture: Digest | None = None
    """Digest of the kinds of modules in the network; tensors do not tell one activation from another."""
    pretrained_weights: Digest | None = None
    """SHA-256 of the checkpoint that this site starts from."""
    keys: SignedKey | None = None
    """With which this site masks, where the federation adds up masked updates."""
    trust: Literal["first_use", "verified"] | None = None
    """How this site knows the identities of the others, in such a federation."""
    privacy: PrivacyDeclaration | None = None
    """Differential privacy of the training; None: it has none."""

    @model_serializer(mode="wrap")
    def _leave_what_is_not_said_out(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A coordinator before 2.8.1+fed.4 does not know these fields, nor does an older list of disclosures.
        return {
            name: value
            for name, value in serialize(self).items()
            if value is not None or name not in NEW_IN_REGISTRATION
        }

    @model_validator(mode="after")
    def _names_are_consistent(self) -> Registration:
        names = {entry.name for entry in self.tensors}
        if len(names) != len(self.tensors):
            raise ValueError("tensors: names are repeated")
        if names & self.aliases.keys() or not set(self.aliases.values()) <= names:
            raise ValueError("aliases must lead from further names to names in tensors")
        if sum(math.prod(entry.shape) for entry in self.tensors) > LARGEST_COUNT:  # a match could not say how many
            raise ValueError("tensors: no network is that large")
        return self


class Match(WithPrecision, Message):
    """The tensors that sites of a run share.

    Decided once, when all have registered.
    """

    ADDED = ("precision", "exchange_every", "keys", "kept_local", "received", "annotated")

    kind: Literal["match"] = "match"
    rule: Literal["name", "resolution"]
    weighting: Literal["cases", "uniform"]
    weights: OneOfSite
    num_epochs: Annotated[int, Field(ge=1, le=10**7)] | None = None
    """None here and below: each site's trainer keeps its own value."""
    num_iterations_per_epoch: Annotated[int, Field(ge=1, le=10**7)] | None = None
    num_val_iterations_per_epoch: Annotated[int, Field(ge=1, le=10**7)] | None = None
    shared: Annotated[dict[TensorName, dict[SiteName, LocalName]], Field(min_length=1, max_length=MAX_TENSORS)]
    """Canonical name -> site -> the site's own name."""
    initial_owner: Annotated[dict[TensorName, SiteName], Field(max_length=MAX_TENSORS)]
    """Canonical name -> the site whose initial values all start from."""
    coverage: Annotated[dict[SiteName, tuple[Count, Count]], Field(max_length=MAX_SITES)]
    """Site -> (parameters it shares, parameters it has)."""
    keys: Annotated[dict[SiteName, SignedKey], Field(max_length=MAX_SITES)] = {}
    """Of the sites, where their updates are masked."""
    kept_local: Annotated[tuple[TensorName, ...], Field(max_length=MAX_TENSORS)] = ()
    """Tensors that several sites have, and too few for a sum that hides each of them."""
    received: Annotated[dict[TensorName, dict[SiteName, LocalName]], Field(max_length=MAX_TENSORS)] = {}
    """Canonical name -> site -> its own name, of sites that receive a shared tensor and do not train it."""
    annotated: Annotated[dict[SiteName, tuple[Label, ...]], Field(max_length=MAX_SITES)] = {}
    """Site -> the foreground labels that it annotates, where sites may annotate different ones."""

    @model_validator(mode="after")
    def _owners_share(self) -> Match:
        if self.initial_owner.keys() != self.shared.keys():
            raise ValueError("initial_owner must name one owner for every shared tensor")
        if any(owner not in self.shared[name] for name, owner in self.initial_owner.items()):
            raise ValueError("an owner must be among the sites that have the tensor")
        if any(self.received[name].keys() & self.shared.get(name, {}).keys() for name in self.received):
            raise ValueError("a site either trains a tensor or receives it only")
        if not self.received.keys() <= self.shared.keys():
            raise ValueError("what sites receive must be shared by others")
        return self

    def names_at(self, site: str) -> dict[str, str]:
        """Return canonical name -> own name of the tensors that a site sends."""
        return {name: sites[site] for name, sites in self.shared.items() if site in sites}

    def received_by(self, site: str) -> dict[str, str]:
        """Return the same of all tensors that it gets, those that it sends included."""
        return self.names_at(site) | {name: sites[site] for name, sites in self.received.items() if site in sites}

    def receivers(self) -> dict[str, frozenset[str]]:
        """Return canonical name -> all sites that get a tensor, senders or not."""
        return {name: frozenset({*sites, *self.received.get(name, ())}) for name, sites in self.shared.items()}


class EarlierMetrics(Part):
    """Measurements of an earlier round that were made after its update had left."""

    round: Annotated[int, Field(ge=0, le=10**7)]
    metrics: Metrics


class Update(Message):
    """One site's share of a round, or of the initial weights.

    Tensors travel under canonical names.

    Weights leave as soon as they are trained, and are validated while they travel. So an update has the training loss
    of its own round and the validation of the round before; that of the last round has both.
    """

    kind: Literal["update"] = "update"
    metrics: Metrics = {}
    """The site's measurements in this round so far. NaN becomes null."""
    earlier: EarlierMetrics | None = None


class Validation(Message):
    """The counts of a site that validated a round's aggregate.

    Voxels per class or region, summed over batches.
    """

    kind: Literal["validation"] = "validation"
    tp: VoxelCounts
    fp: VoxelCounts
    fn: VoxelCounts
    loss: Annotated[Finite | None, BeforeValidator(_null_unless_finite)] = None

    @model_validator(mode="after")
    def _lengths_agree(self) -> Validation:
        if not len(self.tp) == len(self.fp) == len(self.fn):
            raise ValueError("tp, fp and fn must have one entry per class or region")
        return self


class PooledValidation(Message):
    """The scores of a round's aggregate on all sites that validated it."""

    kind: Literal["pooled_validation"] = "pooled_validation"
    round: Annotated[int, Field(ge=0, le=10**7)]
    dice: Annotated[tuple[Finite | None, ...], Field(max_length=MAX_LABELS)]
    """Per class or region, from the sums over all sites; None where no site has any foreground of it."""
    mean_dice: Finite | None
    """Mean over the classes that have one."""
    ema_dice: Finite | None
    """Exponential moving average of the means, as nnU-Net's pseudo Dice."""
    best_round: Annotated[int, Field(ge=0, le=10**7)] | None
    """The round, up to this one, with the highest moving average."""
    best_ema_dice: Finite | None
    dice_of_site: Annotated[dict[SiteName, tuple[Finite | None, ...]], Field(max_length=MAX_SITES)]
    """For the coordinator's records and observers; empty in the message to the sites, and so is the next."""
    loss_of_site: Annotated[dict[SiteName, Finite | None], Field(max_length=MAX_SITES)]


class NextRound(Part):
    """The cohort of the round that follows, and the range of its integers."""

    cohort: SiteNames
    weight_bits: Annotated[int, Field(ge=1, le=24)]
    """Bits of the sum of these sites' weights; more of the sum itself need not be known."""
    typical_change: Annotated[Finite, Field(ge=0)] | None = None
    """Root mean square of the changes of the round before, over its sites."""


class Aggregate(WithAdditions, Message):
    """The aggregate of the updates; tensors travel under canonical names."""

    ADDED = ("next_round",)

    kind: Literal["aggregate"] = "aggregate"
    round: Annotated[int, Field(ge=0, le=10**7)] | None
    """None for the initial weights."""
    contributors: OneOfSite
    missing: SiteNames = ()
    next_round: NextRound | None = None
    """Where updates are masked."""
