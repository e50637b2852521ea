"""Define the base of the steps that carry weights.

It bounds sizes, and finds the tensors that concern a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nnunetv2.federated.errors import RefusedError, WireError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.steps.base import MESSAGE_ALLOWANCE, Step
from nnunetv2.federated.protocol.api import FederationSettings
from nnunetv2.federated.protocol.document import Limits, TensorSpec
from nnunetv2.federated.protocol.keys import NumberedKey, RunKey
from nnunetv2.federated.protocol.messages import Aggregate, Message, Update

K = TypeVar("K", bound=RunKey[Any, Aggregate])
MAX_ROUNDS = 100_000
"""No run has more. A site keeps curves with a value per round."""


class WeightStep(Step[K, Update, Aggregate]):
    """Base of the steps whose documents carry the tensors of a network.

    Children say which a site contributes.
    """

    contribution, results = Update, (Aggregate,)

    def weights(self, key: K, site: str, reader: DocumentReader) -> Mapping[str, TensorSpec]:
        """Return the tensors that a site contributes."""
        raise NotImplementedError

    def limits(self, key: K, site: str, reader: DocumentReader) -> Limits:
        """Return the limits for these tensors."""
        return document_limits.weights_limits(self.weights(key, site, reader))

    def tensors(self, key: K, site: str, message: Update, reader: DocumentReader) -> Mapping[str, TensorSpec]:
        """Return these tensors."""
        return self.weights(key, site, reader)

    def tensors_for(self, key: K, site: str, reader: DocumentReader) -> tuple[str, ...] | None:
        """Return the tensors that a site shares.

        None if these are all, and travel as they are kept.
        """
        agreement = reader.agreement(key.run)
        names = tuple(sorted(agreement.specs_for(site)))
        return None if len(names) == len(agreement.specs) and agreement.codec.is_verbatim else names

    def write_for_sites(
        self, key: K, names: Sequence[str], path: Path, reader: DocumentReader, *, whole: bool = True
    ) -> str:
        """Write these tensors as they travel, and return the SHA-256."""
        with reader.result(key) as result:
            return reader.agreement(key.run).codec.write_for_site(result, path, names, whole=whole)

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits for names and shapes of tensors."""
        return document_limits.AGGREGATE

    def largest_result(self, weights: int) -> int:
        """Return how many bytes an aggregate may have."""
        return weights + MESSAGE_ALLOWANCE

    def check_result(self, key: K, message: Message) -> None:
        """Raise WireError unless a message is an aggregate, of a round where it should be."""
        super().check_result(key, message)
        assert isinstance(message, Aggregate)
        if (message.round is None) == self.policy.recurs:
            raise WireError(
                f"the coordinator answers {key} with an aggregate of "
                f"{'no round' if message.round is None else f'round {message.round}'}"
            )
        check_round(message.round or 0)


def check_number(key: NumberedKey[Any, Any], settings: FederationSettings) -> None:
    """Raise RefusedError if runs have fewer rounds."""
    if settings.num_rounds is not None and key.number >= settings.num_rounds:
        raise RefusedError(f"{key}: the run has {settings.num_rounds} rounds, counted from 0", code="unknown_gathering")


def check_round(number: int) -> None:
    """Raise WireError if no run can have come to a round of this number."""
    if number > MAX_ROUNDS:
        raise WireError(f"the coordinator speaks of round {number}; no run has more than {MAX_ROUNDS}")
