"""Define a step: the behaviour of one kind of exchange.

A step is stateless. It asks the exchanges' `State` for the sites that take part, and the `DocumentReader` for earlier
documents; it knows of no sockets, clocks or databases. `steps/__init__.py` lists all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from nnunetv2.federated.errors import RefusedError, StatisticsError, WireError
from nnunetv2.federated.exchanges import document_limits
from nnunetv2.federated.exchanges.consistency import first_change
from nnunetv2.federated.exchanges.documents import DocumentReader
from nnunetv2.federated.exchanges.exchange import Closed, Exchange, Policy, changed_since, close_with
from nnunetv2.federated.privacy.plans_redaction import without_extrema
from nnunetv2.federated.protocol.api import FederationSettings, RunState
from nnunetv2.federated.protocol.document import Document, Limits, TensorSpec, check_tensors, write_document
from nnunetv2.federated.protocol.keys import Key, Q, R, RunKey
from nnunetv2.federated.protocol.messages import Message

K = TypeVar("K", bound=Key)
MESSAGE_ALLOWANCE = 4 << 20
"""Bytes that a result may have: names and shapes, beside the tensors of weights."""
LARGEST_MESSAGE = 64 << 20
"""Bytes of a result that grows with cases or tensors of all sites: a pooled fingerprint, a match."""


class State(Protocol):
    """Answers from the exchanges of a federation; `registry.ExchangeRegistry` gives them."""

    settings: FederationSettings

    def get(self, key: Key) -> Exchange | None:
        """Return an exchange that has begun, or None."""
        ...

    def is_closed(self, key: Key) -> bool:
        """Tell whether an exchange has its result."""
        ...

    def contributors(self, key: Key) -> frozenset[str]:
        """Name the sites whose contributions are in a result.

        Empty as long as there is no result.
        """
        ...

    def members(self, run: str) -> frozenset[str]:
        """Name the sites that take part in the rounds of a run."""
        ...

    def left(self, run: str) -> frozenset[str]:
        """Name the sites that have left a run."""
        ...

    def run_state(self, run: str) -> RunState:
        """Say how far a run is."""
        ...

    def latest_number(self, run: str) -> int | None:
        """Return the number of the last round of a run that is closed, or None."""
        ...

    def cohort(self, run: str, number: int) -> frozenset[str]:
        """Name the sites that mask with each other in a round, once they are known."""
        ...

    def next_cohort(self, run: str, number: int, missing: Iterable[str]) -> tuple[str, ...]:
        """Name the sites that mask in the round after one that closes now."""
        ...


@dataclass(frozen=True)
class Computed:
    """The result of an exchange, which is in its place."""

    digest: str
    """Its SHA-256."""
    record: Mapping[str, Any] | None = None
    """The record of a round or validation, as JSON, which stays when its documents are gone."""
    remarks: tuple[str, ...] = ()
    """Lines on it for the person at the coordinator."""


class Step(Generic[K, Q, R]):
    """One kind of exchange: keys K, contributions Q, results R."""

    key: ClassVar[type[Key]]
    contribution: type[Q]
    results: tuple[type[R], ...]
    policy: ClassVar[Policy] = Policy()
    contribution_note: ClassVar[str] = ""
    """Note on the contribution in the documentation of the protocol: its tensors and peculiarities."""
    result_note: ClassVar[str] = ""
    """The same for the result."""
    closing_note: ClassVar[str] = ""
    """With how many contributions it closes, where its policy does not tell."""

    # ------------------------------------------------------------------------------------------- who, and when
    def prerequisite(self, key: K) -> Key | None:
        """Return the exchange that must be closed before this one can begin."""
        return None

    def check_may_begin(self, key: K, settings: FederationSettings) -> None:
        """Raise RefusedError if settings do not provide for this exchange."""

    def expected(self, key: K, state: State) -> frozenset[str]:
        """Return the sites that are to contribute to an open exchange now."""
        return frozenset(state.settings.sites)

    def required(self, key: K, reader: DocumentReader) -> Iterable[str]:
        """Return the sites without which no deadline closes it.

        The exchange before is closed.
        """
        return ()

    def floor(self, key: K, state: State) -> int:
        """Return how many contributions there must be, whatever happens."""
        return state.settings.min_sites if self.policy.pooled else 1

    def closes_at(self, key: K, state: State) -> int | None:
        """Return how many contributions close it at any time, or None."""
        return None

    def may_read(self, key: K, site: str, state: State) -> bool:
        """Tell whether a site that is not expected may have the result.

        By default, if it takes part in the run.
        """
        return isinstance(key, RunKey) and site in state.members(key.run)

    def is_overtaken(self, key: K, state: State) -> bool:
        """Tell whether a later exchange has been closed already."""
        return False

    def place(self, key: K, site: str, digest: str, state: State) -> Key:
        """Return the exchange in which a contribution counts.

        This one, or a later one if it comes too late.
        """
        return key

    def newest(self, key: K, state: State) -> Key:
        """Return the exchange whose result a site gets that has missed this one."""
        return key

    def used_by(self, key: K) -> Key | None:
        """Return the exchange whose result is made of these contributions, where it is another one."""
        return None

    def is_used_up(self, key: K, state: State) -> bool:
        """Tell whether the exchange for which a closed one was made is closed, too."""
        used_by = self.used_by(key)
        return used_by is not None and state.is_closed(used_by)

    def newcomer(self, key: K) -> str | None:
        """Return the site that the closing lets into a run that has begun."""
        return None

    # -------------------------------------------------------------------------------------------- contributions
    header: ClassVar[Limits] = document_limits.SMALL
    """How large the header of a contribution may be, where nothing is known beforehand."""

    def limits(self, key: K, site: str, reader: DocumentReader) -> Limits:
        """Return how large a document of a site may be.

        The exchange has begun.
        """
        return document_limits.with_tensors(self.header)

    def tensors(self, key: K, site: str, message: Q, reader: DocumentReader) -> Mapping[str, TensorSpec]:
        """Return the tensors that a contribution is to have."""
        return {}

    def check(
        self, key: K, site: str, document: Document[Q], reader: DocumentReader, settings: FederationSettings
    ) -> None:
        """Raise WireError or StatisticsError if a contribution contradicts itself.

        Or earlier documents of the site.
        """

    def check_contribution(
        self, key: K, site: str, document: Document[Any], reader: DocumentReader, settings: FederationSettings
    ) -> None:
        """Raise WireError unless a document is a valid contribution of a site.

        That concerns its kind, the names, shapes and finite values of its tensors, and its consistency.
        """
        if not isinstance(document.message, self.contribution):
            raise WireError(
                f"{key} takes messages of kind {kind_of(self.contribution)}, "
                f"this one is of kind {document.message.kind}"
            )
        self.check_tensors(document, self.tensors(key, site, document.message, reader))
        try:
            self.check(key, site, document, reader, settings)
        except StatisticsError as error:
            raise WireError(f"what site {site} sends cannot be right: {error}") from error

    def check_tensors(self, document: Document[Q], expected: Mapping[str, TensorSpec]) -> None:
        """Raise WireError unless a document has these tensors, finite throughout."""
        check_tensors(document, expected)

    def check_unchanged(self, key: K, site: str, message: Q, reader: DocumentReader) -> None:
        """Raise RefusedError, naming the difference, unless a site repeats its contribution."""
        with reader.contribution(key, site) as held:
            before, now = self.compared(key, held.message, message, reader)
        change = first_change(before, now)
        if change is not None:
            raise changed_since(key, site, change)

    def compared(
        self, key: K, before: Q, now: Q, reader: DocumentReader
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the fields that must agree in two contributions of a site."""
        return comparable(before), comparable(now)

    # -------------------------------------------------------------------------------------------------- closing
    def outcome(self, exchange: Exchange, now: float, state: State) -> Closed:
        """Return whose contributions count in an exchange that closes now, and who is missing."""
        return closed_outcome(close_with(exchange, now))

    def close(self, exchange: Exchange, settings: FederationSettings, reader: DocumentReader) -> Computed:
        """Compute the result of an exchange and write it to its place.

        Args:
            exchange: With the outcome that it will have; its contributors are those that count.

        Raises:
            FederationError: The contributions do not go together; the text is meant for all sites.
        """
        with reader.contributions(exchange) as documents:
            return self.combine(exchange, documents, settings, reader)

    def abandon(self, exchange: Exchange, settings: FederationSettings, reader: DocumentReader) -> Computed:
        """Write the result of an exchange that the operator has closed without any contribution."""
        raise RefusedError(f"{exchange.key} cannot be closed without contributions", code="not_open")

    def combine(
        self,
        exchange: Exchange,
        documents: Mapping[str, Document[Q]],
        settings: FederationSettings,
        reader: DocumentReader,
    ) -> Computed:
        """Make the result of the contributions that count, and write it.

        By default, it is a message alone.
        """
        key: Any = exchange.key
        result = self.pool(key, documents, settings, reader)
        remarks = tuple(self.remarks(key, documents, result))
        return Computed(write_document(reader.result_path(key), result, {}, []), remarks=remarks)

    def pool(
        self, key: K, documents: Mapping[str, Document[Q]], settings: FederationSettings, reader: DocumentReader
    ) -> R:
        """Make a message of the contributions that count."""
        raise NotImplementedError

    def remarks(self, key: K, documents: Mapping[str, Document[Q]], result: R) -> Iterable[str]:
        """Return lines on a result for the person at the coordinator."""
        return ()

    def describe(self, key: K) -> str:
        """Return the name of an exchange, as people read it."""
        return str(key)

    def describe_closing(self, key: K) -> str:
        """Describe the outcome of an exchange of one site alone.

        Empty where there are several sites.
        """
        return ""

    # -------------------------------------------------------------------------------------------------- results
    def tensors_for(self, key: K, site: str, reader: DocumentReader) -> tuple[str, ...] | None:
        """Return the tensors of a result that concern a site, sorted.

        None if it gets the result as it is kept.
        """
        return None

    def write_for_sites(
        self, key: K, names: Sequence[str], path: Path, reader: DocumentReader, *, whole: bool = True
    ) -> str:
        """Write these tensors of a result as they travel, and return the SHA-256.

        Args:
            whole: For a site that has not got the result before; else the changes since that suffice.
        """
        raise NotImplementedError

    def result_limits(self, num_cases: int | None) -> Limits:
        """Return the limits of a result from a coordinator.

        Its tensors are not counted.

        Args:
            num_cases: The cases of all sites, where that is known.
        """
        return document_limits.SMALL

    def largest_result(self, weights: int) -> int:
        """Return how many bytes a result may have.

        Args:
            weights: Bytes of the site's own weights in the run; 0 if it has registered none.
        """
        return MESSAGE_ALLOWANCE

    def check_result(self, key: K, message: Message) -> None:
        """Raise WireError unless a message is a result of the exchange."""
        if not isinstance(message, self.results):
            raise WireError(
                f"the coordinator answers {key} with a message of kind {message.kind}, expected "
                f"{' or '.join(map(kind_of, self.results))}"
            )


def kind_of(message: type[Message]) -> str:
    """Return the kind that a message has on the wire."""
    return str(message.model_fields["kind"].default)


def comparable(message: Message) -> dict[str, Any]:
    """Return a message as JSON, without voxels' extrema in its plans.

    Versions of the software differ in them.
    """
    content = message.model_dump(mode="json")
    return {**content, "plans": without_extrema(content["plans"])} if "plans" in content else content


def messages_of(documents: Mapping[str, Document[Q]]) -> dict[str, Q]:
    """Return the message of each site."""
    return {site: document.message for site, document in documents.items()}


def closed_outcome(exchange: Exchange) -> Closed:
    """Return the outcome of an exchange that is being closed."""
    assert isinstance(exchange.outcome, Closed)
    return exchange.outcome
