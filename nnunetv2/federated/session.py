"""One site's way through a training run: register, start from common weights, exchange every round, rejoin.

Knows weights as named arrays and the coordinator as a `Transport`; knows nothing of networks, trainers or files.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nnunetv2.federated import messages
from nnunetv2.federated.errors import FederationError, MatchingError
from nnunetv2.federated.transport import Transport
from nnunetv2.federated.wire import Document

Weights = Mapping[str, np.ndarray]
"""Local name -> float32 array."""


@dataclass(frozen=True)
class Position:
    """Where a site that starts or returns has to go on."""

    epoch: int
    """The next epoch to train; the number of epochs if the run is over."""
    weights: Weights
    """The shared weights to go on with, under the site's own names."""


class RunSession:
    """A site's membership in one training run.

    Args:
        transport: The way to the coordinator.
        site: Name of this site.
        run: Name of the run, see `messages.run_name`.
    """

    def __init__(self, transport: Transport, *, site: str, run: str) -> None:
        self.transport = transport
        self.site = site
        self.run = run
        self.match: messages.Match | None = None

    def register(self, registration: messages.Registration) -> messages.Match:
        """Say what this site trains, wait for the others, and learn what is shared.

        A run that has begun without this site admits it; one that it has left takes it back.

        Raises:
            RefusedError: The networks, labels or channels of the sites do not go together.
        """
        state = self.transport.run_state(self.run)
        has_begun = bool(state.members or state.left)
        key = messages.registration_key(self.run)
        if has_begun and self.site not in state.registered:
            key = messages.admission_key(self.run, self.site)
        answer = self.transport.exchange(key, registration).message
        if self.site in state.left:
            self.transport.act(self.run, "return")
        if self.site not in answer.coverage:
            raise MatchingError(f"site {self.site} is not among those that registered for run {self.run}")
        self.match = answer
        return answer

    @property
    def local_names(self) -> dict[str, str]:
        """Canonical name -> this site's own name, of every tensor that it shares."""
        if self.match is None:
            raise FederationError("register first: what is shared is not known yet")
        return {name: sites[self.site] for name, sites in self.match.shared.items() if self.site in sites}

    def start(self, epoch: int, weights: Weights) -> Position:
        """Find out where to go on, and with which weights.

        Args:
            epoch: The epoch that the site would train next on its own. It may be one ahead of the run: a site that
                saved its best weights and was killed before the exchange trains that epoch again.
            weights: Its present weights. Where the run has not begun, those that this site owns become everybody's.

        Raises:
            FederationError: The site's checkpoint is ahead of the run, so it belongs to another federation.
        """
        state = self.transport.run_state(self.run)
        if not state.closed and state.open_round is None:
            return Position(0, self._exchange_initial(weights))
        open_round = state.num_rounds if state.closed else state.open_round
        if epoch > open_round + 1:
            raise FederationError(
                f"run {self.run} is at round {open_round}, this site's checkpoint at epoch {epoch}: it comes from "
                "another federation. Start without --c to join this one, or use the credential of the other.")
        if open_round == 0:
            return Position(0, self._fetch(messages.initial_key(self.run)))
        return Position(open_round, self._fetch(messages.round_key(self.run, open_round - 1)))

    def exchange(self, number: int, weights: Weights,
                 metrics: Mapping[str, object]) -> tuple[Weights, messages.Aggregate]:
        """Send the shared weights of a round, wait until it closes, and return the aggregate under local names."""
        document = self.transport.exchange(messages.round_key(self.run, number), messages.Update(metrics=dict(metrics)),
                                           self._under_canonical_names(weights, self.local_names))
        return self._read(document), document.message

    def _exchange_initial(self, weights: Weights) -> Weights:
        owned = {name: local for name, local in self.local_names.items() if self.match.initial_owner[name] == self.site}
        document = self.transport.exchange(messages.initial_key(self.run), messages.Update(),
                                           self._under_canonical_names(weights, owned))
        return self._read(document)

    def _fetch(self, key: str) -> Weights:
        return self._read(self.transport.result(key))

    @staticmethod
    def _under_canonical_names(weights: Weights, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        return {name: weights[local] for name, local in sorted(names.items())}

    def _read(self, document: Document) -> Weights:
        """Map the aggregate to local names; refuse one that lacks a tensor, so that nobody trains on half a network."""
        missing = self.local_names.keys() - document.specs.keys()
        if missing:
            raise FederationError(f"the coordinator's aggregate lacks tensor {min(missing)} ({len(missing)} in all)")
        return {local: document.read(name) for name, local in self.local_names.items()}

    def report_failure(self, number: int | None, reason: str) -> None:
        """Tell the coordinator that this site cannot go on, so that the others know whom they wait for."""
        self.transport.report_failure(self.run, number, reason)
