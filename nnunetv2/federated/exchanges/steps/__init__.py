"""List the steps of a federation, and find the step of a key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import Exchange
from nnunetv2.federated.exchanges.steps.base import K, Step
from nnunetv2.federated.exchanges.steps.census import CensusStep
from nnunetv2.federated.exchanges.steps.coarse_histogram import CoarseHistogramStep
from nnunetv2.federated.exchanges.steps.fine_histogram import FineHistogramStep
from nnunetv2.federated.exchanges.steps.fingerprint_sums import (
    FingerprintSumStep,
    FingerprintSurvivorsStep,
    FingerprintUploadStep,
    ShapeSumStep,
    ShapeSurvivorsStep,
    ShapeUploadStep,
)
from nnunetv2.federated.exchanges.steps.initial_weights import InitialWeightsStep
from nnunetv2.federated.exchanges.steps.late_join import AdmissionStep, LateCensusStep, LatePlansStep
from nnunetv2.federated.exchanges.steps.masked_round import RoundSurvivorsStep, RoundUploadStep
from nnunetv2.federated.exchanges.steps.masked_validation import ValidationSurvivorsStep, ValidationUploadStep
from nnunetv2.federated.exchanges.steps.plans import PlansStep
from nnunetv2.federated.exchanges.steps.registration import RegistrationStep
from nnunetv2.federated.exchanges.steps.training_round import TrainingRoundStep
from nnunetv2.federated.exchanges.steps.validation import ValidationStep
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.keys import ExchangeKey, Key

AnyStep = Step[Any, Any, Any]
STEPS: tuple[AnyStep, ...] = (
    CensusStep(),
    CoarseHistogramStep(),
    FineHistogramStep(),
    FingerprintUploadStep(),
    FingerprintSurvivorsStep(),
    FingerprintSumStep(),
    LateCensusStep(),
    ShapeUploadStep(),
    ShapeSurvivorsStep(),
    ShapeSumStep(),
    PlansStep(),
    LatePlansStep(),
    RegistrationStep(),
    AdmissionStep(),
    InitialWeightsStep(),
    RoundUploadStep(),
    RoundSurvivorsStep(),
    TrainingRoundStep(),
    ValidationUploadStep(),
    ValidationSurvivorsStep(),
    ValidationStep(),
)
_STEP_OF_KEY: dict[type[Key], AnyStep] = {step.key: step for step in STEPS}


def step_of(key: K) -> Step[K, Any, Any]:
    """Return the step that is taken under a key."""
    return _STEP_OF_KEY[type(key)]


def parse_key(text: str) -> Key:
    """Take a key apart. One that is taken apart already stays as it is.

    Raises:
        RefusedError: There is no exchange of this name; its code is `unknown_gathering`.
    """
    if isinstance(text, ExchangeKey):
        return text
    for step in STEPS:
        key = step.key.parse(text)
        if key is not None:
            return key
    raise RefusedError(
        f"there is no gathering {text[:200]!r}", "Use matching versions at all sites.", code="unknown_gathering"
    )


def prerequisite(key: Key) -> Key | None:
    """Return the exchange that must be closed before this one can begin."""
    return step_of(key).prerequisite(key)


def fresh_exchange(
    key: Key, settings: FederationSettings, *, expected: Iterable[str] | None = None, required: Iterable[str] = ()
) -> Exchange:
    """Return an exchange that nobody has contributed to; all sites are expected unless told otherwise."""
    policy = step_of(key).policy
    return Exchange(
        key=key,
        policy=policy,
        expected=frozenset(settings.sites if expected is None else expected),
        required=frozenset(required),
        quorum=settings.quorum if policy.by_quorum else None,
        floor=settings.min_sites if policy.pooled else 1,
        deadline_s=settings.deadline_s if policy.by_quorum else None,
    )
