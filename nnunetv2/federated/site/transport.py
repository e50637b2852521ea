"""The seam between a site and the rest of its federation: HTTP is one transport, an engine's own is another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from nnunetv2.federated.protocol.api import FederationSettings, Outlooks, Receipt, RunState
    from nnunetv2.federated.protocol.document import Document, TensorSpec
    from nnunetv2.federated.protocol.keys import ExchangeKey, Q, R


class Transport(Protocol):
    """What a site needs of whatever connects it to the coordinator. `FederationClient` is the transport over HTTP."""

    def settings(self, *, patience_s: float | None = None) -> FederationSettings:
        """Return what holds for all sites of the federation."""
        ...

    def exchange(
        self,
        key: ExchangeKey[Q, R],
        message: Q,
        tensors: Mapping[str, np.ndarray] | None = None,
        *,
        specs: Mapping[str, TensorSpec] | None = None,
    ) -> Document[R]:
        """Contribute to an exchange, wait until it is closed, and return its result.

        Idempotent: after a crash the same call goes on where it was. The result stays open until the next exchange.

        Raises:
            RefusedError: The contribution is not accepted, or the contributions do not go together.
            CoordinatorUnreachable: The coordinator did not answer for too long.
        """
        ...

    def result(self, key: ExchangeKey[Any, R]) -> Document[R]:
        """Wait until an exchange is closed and return its result, without contributing."""
        ...

    def run_state(self, run: str, *, plans: str | None = None) -> RunState:
        """Return how far a training run is.

        Args:
            plans: Name of the plans that this site trains with. The run that the answer names is the one that such a
                training belongs to: another one, where this site has trained with other plans under this name.
        """
        ...

    def outlooks(self) -> Outlooks:
        """Return which runs will have a common model, and why others will not."""
        ...

    def contribute(
        self,
        key: ExchangeKey[Q, Any],
        message: Q,
        tensors: Mapping[str, np.ndarray] | None = None,
        *,
        specs: Mapping[str, TensorSpec] | None = None,
        patience_s: float | None = None,
    ) -> Receipt:
        """Contribute to an exchange whose result this site does not wait for.

        Args:
            patience_s: Seconds after which a coordinator that is away is given up; by default what the site has set.
        """
        ...

    def act(self, run: str, action: str, exchange: str | None = None) -> RunState:
        """Leave a run, or return to it."""
        ...

    def report_failure(self, run: str, round_number: int | None, reason: str) -> None:
        """Tell the coordinator, if it can be reached at once, that this site cannot go on. Never raises."""
        ...

    def close(self) -> None:
        """Let go of connections and temporary files."""
        ...

    def __enter__(self) -> Transport: ...

    def __exit__(self, *_: object) -> None: ...
