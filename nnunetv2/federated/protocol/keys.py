"""Name the exchanges between sites and coordinator: a key is a path.

    fingerprint/census              runs/3d_fullres.fold_0.nnUNetTrainerFedAvg/rounds/12

A key is its text, since routes, folders and rows of a database are named by it, and it knows the parts of that text.
Its class names the messages of the exchange: `ExchangeKey[Q, R]` takes messages Q and results in a message R. How they
are checked and combined is in `exchanges/steps/`, whose `parse_key` turns text into keys.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from nnunetv2.federated.protocol.messages import (
    SEGMENT_PATTERN,
    SITE_PATTERN,
    Aggregate,
    Census,
    CoarseSummary,
    FineSummary,
    Match,
    Message,
    PlansAgreement,
    PlansReport,
    PooledCensus,
    PooledFingerprint,
    PooledValidation,
    Registration,
    Update,
    Validation,
    WantedBins,
)
from nnunetv2.federated.protocol.secure_fingerprint_messages import NextSum, ResampledShape
from nnunetv2.federated.protocol.secure_messages import (
    Confirmation,
    Confirmed,
    MaskedUpdate,
    Survivors,
    UnmaskingShares,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Q = TypeVar("Q", bound=Message)
"""The message that a site contributes."""
R = TypeVar("R", bound=Message)
"""The message that all sites receive."""

_SEGMENT = SEGMENT_PATTERN.strip("^$")
_PARTS = {"site": SITE_PATTERN.strip("^$"), "number": "0|[1-9][0-9]{0,7}", "again": "[1-9][0-9]{0,2}"}
"""Part of a key -> regular expression; all others are segments."""
_NUMBERS = ("number", "again")


class ExchangeKey(str, Generic[Q, R]):
    """The key of one exchange. Children name their parts, in the order of the pattern."""

    kind: ClassVar[str]
    """Name of exchanges of this kind in figures and pages, such as "round"."""
    pattern: ClassVar[str]
    """Such as "runs/{run}/rounds/{number}"; parts in square brackets may be absent."""
    _expression: ClassVar[re.Pattern[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "pattern" in vars(cls):
            pattern = cls.pattern.replace("[", "(?:").replace("]", ")?")
            cls._expression = re.compile(re.sub(r"\{(\w+)\}", _group, pattern))

    @classmethod
    def _named(cls, text: str, **parts: str | int) -> Self:
        key = str.__new__(cls, text)
        vars(key).update(parts)
        return key

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Take a text apart; None if it is no key of this class."""
        match = cls._expression.fullmatch(text)
        if match is None:
            return None
        parts = match.groupdict(default="0")
        return cls(**{name: int(part) if name in _NUMBERS else part for name, part in parts.items()})

    def __str__(self) -> str:
        return str.__str__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).parse, (str.__str__(self),)


Key = ExchangeKey[Any, Any]
"""Any of them."""


def _group(part: re.Match[str]) -> str:
    return f"(?P<{part[1]}>{_PARTS.get(part[1], _SEGMENT)})"


def segment(text: str) -> str:
    """Return `text` if it can stand between two slashes of a key.

    Raises:
        ValueError: It is too long, or has other characters.
    """
    if not re.fullmatch(SEGMENT_PATTERN.strip("^$"), text):
        raise ValueError(f"{text!r} cannot be part of a key: use at most 128 letters, digits, '_', '-', '+' and '.'")
    return text


# ---------------------------------------------------------------------------------------- fingerprint and plans
class CensusKey(ExchangeKey[Census, PooledCensus]):
    """The sites compare their datasets and count their cases."""

    kind, pattern = "census", "fingerprint/census"

    def __new__(cls) -> Self:
        return cls._named(cls.pattern)


class CoarseKey(ExchangeKey[CoarseSummary, WantedBins]):
    """The sites add up coarse histograms."""

    kind, pattern = "coarse", "fingerprint/coarse"

    def __new__(cls) -> Self:
        return cls._named(cls.pattern)


class FineKey(ExchangeKey[FineSummary, PooledFingerprint | WantedBins]):
    """The exchange of fine histograms.

    Of the first bins, or of the others that these have led to.
    """

    kind, pattern = "fine", "fingerprint/fine[/{again}]"
    again: int
    """How often bins were looked into before."""

    def __new__(cls, again: int = 0) -> Self:
        return cls._named(f"fingerprint/fine/{again:d}" if again else "fingerprint/fine", again=again)


class PlansKey(ExchangeKey[PlansReport, PlansAgreement]):
    """The sites compare their plans."""

    kind, pattern = "plans", "plans/{plans}"
    plans: str

    def __new__(cls, plans: str) -> Self:
        return cls._named(f"plans/{segment(plans)}", plans=plans)


class LateCensusKey(ExchangeKey[Census, PooledCensus]):
    """One site compares its dataset after the fingerprints were pooled."""

    kind, pattern = "late_census", "fingerprint/admissions/{site}"
    site: str

    def __new__(cls, site: str) -> Self:
        return cls._named(f"fingerprint/admissions/{segment(site)}", site=site)


class LatePlansKey(ExchangeKey[PlansReport, PlansAgreement]):
    """One site compares its plans with those that the others agreed on before."""

    kind, pattern = "late_plans", "plans/{plans}/admissions/{site}"
    plans: str
    site: str

    def __new__(cls, plans: str, site: str) -> Self:
        return cls._named(f"plans/{segment(plans)}/admissions/{segment(site)}", plans=plans, site=site)


# ------------------------------------------------------------------------- the same, where statistics are masked
class FingerprintSumUploadKey(ExchangeKey[MaskedUpdate, Survivors]):
    """The sites send masked statistics for one sum, and learn whose have arrived."""

    kind, pattern = "fingerprint_upload", "fingerprint/sums/{number}/uploads"
    number: int

    def __new__(cls, number: int) -> Self:
        return cls._named(f"fingerprint/sums/{number:d}/uploads", number=number)


class FingerprintSumSurvivorsKey(ExchangeKey[Confirmation, Confirmed]):
    """The sites confirm to each other whose masked statistics are there."""

    kind, pattern = "fingerprint_survivors", "fingerprint/sums/{number}/survivors"
    number: int

    def __new__(cls, number: int) -> Self:
        return cls._named(f"fingerprint/sums/{number:d}/survivors", number=number)


class FingerprintSumKey(ExchangeKey[UnmaskingShares, NextSum | PooledFingerprint]):
    """The sites help to unmask a sum of statistics, and learn the next one."""

    kind, pattern = "fingerprint_sum", "fingerprint/sums/{number}"
    number: int
    """How many sums there were before."""

    def __new__(cls, number: int) -> Self:
        return cls._named(f"fingerprint/sums/{number:d}", number=number)


class ShapeSumUploadKey(ExchangeKey[MaskedUpdate, Survivors]):
    """The sites send masked counts of shapes at the target spacing of some plans."""

    kind, pattern = "shape_upload", "plans/{plans}/sums/{number}/uploads"
    plans: str
    number: int

    def __new__(cls, plans: str, number: int) -> Self:
        return cls._named(f"plans/{segment(plans)}/sums/{number:d}/uploads", plans=plans, number=number)


class ShapeSumSurvivorsKey(ExchangeKey[Confirmation, Confirmed]):
    """The sites confirm to each other whose masked counts of shapes are there."""

    kind, pattern = "shape_survivors", "plans/{plans}/sums/{number}/survivors"
    plans: str
    number: int

    def __new__(cls, plans: str, number: int) -> Self:
        return cls._named(f"plans/{segment(plans)}/sums/{number:d}/survivors", plans=plans, number=number)


class ShapeSumKey(ExchangeKey[UnmaskingShares, NextSum | ResampledShape]):
    """The sites help to unmask a sum of counts, and learn the next one."""

    kind, pattern = "shape_sum", "plans/{plans}/sums/{number}"
    plans: str
    number: int

    def __new__(cls, plans: str, number: int) -> Self:
        return cls._named(f"plans/{segment(plans)}/sums/{number:d}", plans=plans, number=number)


# ------------------------------------------------------------------------------------------------- training runs
class RunKey(ExchangeKey[Q, R]):
    """Base of the keys of a training run."""

    run: str

    def __new__(cls, run: str) -> Self:
        return cls._named(cls.pattern.format(run=segment(run)), run=run)


class NumberedKey(RunKey[Q, R]):
    """Base of the keys of one round of a run."""

    number: int
    """The round, counted from 0."""

    def __new__(cls, run: str, number: int) -> Self:
        return cls._named(cls.pattern.format(run=segment(run), number=int(number)), run=run, number=number)


class RegistrationKey(RunKey[Registration, Match]):
    """The sites of a run register their trainings."""

    kind, pattern = "registration", "runs/{run}/registration"


class AdmissionKey(RunKey[Registration, Match]):
    """One site joins a run that has begun."""

    kind, pattern = "admission", "runs/{run}/admissions/{site}"
    site: str

    def __new__(cls, run: str, site: str) -> Self:
        return cls._named(f"runs/{segment(run)}/admissions/{segment(site)}", run=run, site=site)


class InitialKey(RunKey[Update, Aggregate]):
    """The sites settle the weights that all start from."""

    kind, pattern = "initial", "runs/{run}/initial"


class UploadKey(NumberedKey[MaskedUpdate, Survivors | Aggregate]):
    """The sites send masked weights of a round, and learn whose have arrived."""

    kind, pattern = "upload", "runs/{run}/uploads/{number}"


class SurvivorsKey(NumberedKey[Confirmation, Confirmed | Aggregate]):
    """The sites of a round confirm to each other whose masked weights are there."""

    kind, pattern = "survivors", "runs/{run}/survivors/{number}"


class RoundKey(NumberedKey[Update | UnmaskingShares, Aggregate]):
    """The sites average their weights; where these are masked, they help to unmask the sum."""

    kind, pattern = "round", "runs/{run}/rounds/{number}"


class ValidationUploadKey(NumberedKey[MaskedUpdate, Survivors | PooledValidation]):
    """The sites send masked counts of a validation."""

    kind, pattern = "validation_upload", "runs/{run}/validations/{number}/uploads"


class ValidationSurvivorsKey(NumberedKey[Confirmation, Confirmed]):
    """The sites of a validation confirm to each other whose masked counts are there."""

    kind, pattern = "validation_survivors", "runs/{run}/validations/{number}/survivors"


class ValidationKey(NumberedKey[Validation | UnmaskingShares, PooledValidation]):
    """The sites add up their validations of the aggregate of a round."""

    kind, pattern = "validation", "runs/{run}/validations/{number}"


# ------------------------------------------------------------------------------------------------- names of runs
def run_name(configuration: str, fold: int | str, trainer: str) -> str:
    """Return the name that a training run has in this federation."""
    return segment(f"{configuration}.fold_{fold}.{trainer}")


def run_with_plans(run: str, plans_name: str) -> str:
    """Return the name of a run whose plain name was trained with other plans.

    Raises:
        ValueError: It is too long, or cannot be part of a key.
    """
    return segment(f"{run}.{plans_name}")
