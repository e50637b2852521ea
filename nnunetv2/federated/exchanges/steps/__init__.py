"""List the steps of a federation, and find the step of a key."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.exchanges.exchange import Exchange
from nnunetv2.federated.exchanges.steps.base import K, Step
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.keys import ExchangeKey, Key, NumberedKey, RunKey

AnyStep = Step[Any, Any, Any]
# A new kind of exchange is a file of its own and a line here.
_FILES = (
    "census",
    "coarse_histogram",
    "fine_histogram",
    "fingerprint_sums",
    "plans",
    "registration",
    "late_join",
    "initial_weights",
    "masked_round",
    "training_round",
    "masked_validation",
    "validation",
)
STEPS: tuple[AnyStep, ...] = tuple(step for file in _FILES for step in import_module(f"{__name__}.{file}").STEPS)
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


def keys_that_stop_with(run: str, number: int) -> list[Key]:
    """Return the exchanges of a run and a round that end when it is stopped.

    Begun or not.
    """
    kinds = [step.key for step in STEPS if step.policy.stops_with_run]
    return [
        kind(run, number) if issubclass(kind, NumberedKey) else kind(run) for kind in kinds if issubclass(kind, RunKey)
    ]


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
