"""Connect a site to its coordinator, over HTTP or another transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from nnunetv2.federated.errors import FederationError
from nnunetv2.utilities.plain_text import show

if TYPE_CHECKING:
    import numpy as np

    from nnunetv2.federated.protocol.api import FederationSettings, Outlooks, Receipt, RunState
    from nnunetv2.federated.protocol.document import Document, TensorSpec
    from nnunetv2.federated.protocol.keys import ExchangeKey, Q, R
    from nnunetv2.federated.site.credential import SiteCredential

VALIDATION_PATIENCE_S = 120.0
"""How long to try to deliver a validation, which nobody waits for."""


class Transport(Protocol):
    """The requests of a site to its coordinator. `transports/http.py` sends them over HTTP."""

    def settings(self, *, patience_s: float | None = None) -> FederationSettings:
        """Return the settings of the federation."""
        ...

    def exchange(
        self,
        key: ExchangeKey[Q, R],
        message: Q,
        tensors: Mapping[str, np.ndarray] | None = None,
        *,
        specs: Mapping[str, TensorSpec] | None = None,
        since: str | None = None,
        told: Callable[[bool], object] = ...,
    ) -> Document[R]:
        """Contribute to an exchange, and return its result once it closes.

        Idempotent: after a crash the same call goes on where it was. The result stays open until the next exchange.

        Args:
            since: SHA-256 of the aggregate before, as this site has received it: if that is still the coordinator's,
                the changes since suffice, where weights travel as such.
            told: Told whether this contribution counts, or another one of this site that the coordinator holds.

        Raises:
            RefusedError: The contribution is not accepted, or the contributions do not go together.
            CoordinatorUnreachable: The coordinator did not answer for too long.
        """
        ...

    def result(self, key: ExchangeKey[Any, R], *, wait_s: float | None = None) -> Document[R]:
        """Wait until an exchange is closed and return its result, without contributing.

        Args:
            wait_s: How long to wait for other sites. None: as long as it takes.

        Raises:
            StillOpenError: It was not closed in that time.
        """
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
            patience_s: Seconds after which a coordinator that is away is given up; by default the site's setting.
        """
        ...

    def act(self, run: str, action: Literal["leave", "return"], exchange: str | None = None) -> RunState:
        """Leave a run, or return to it."""
        ...

    def report_failure(self, run: str, round_number: int | None, reason: str) -> None:
        """Report a failure of this site, if the coordinator answers at once. Never raises."""
        ...

    def close(self) -> None:
        """Let go of connections and temporary files."""
        ...

    def __enter__(self) -> Transport: ...

    def __exit__(self, *_: object) -> None: ...


def open_transport(credential: SiteCredential, report: Callable[[str], object]) -> Transport:
    """Open the transport that the scheme of the coordinator's address asks for.

    Args:
        report: Receives a line of progress at every change, such as of the awaited sites.

    Raises:
        FederationError: There is no transport for that scheme, or plain HTTP is not allowed to that machine.
    """
    scheme = urlsplit(credential.url).scheme
    if scheme not in ("http", "https"):
        raise FederationError(
            f"{credential.url[:200]!r} cannot be reached: expected an address that begins with "
            "http:// or https://. Join again with a new invitation and --replace"
        )
    from nnunetv2.federated.site.transports.http import HttpTransport

    return HttpTransport(credential, report=report)


def show_progress(text: str) -> None:
    """Show a line of progress to the person at the terminal."""
    show(text, flush=True)
