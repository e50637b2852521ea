"""Define the service behind the HTTP routes of a site.

The coordinator is one. A gateway at a site, which reaches its coordinator in another way than HTTP, is to be another:
`build_site_app` serves either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nnunetv2.federated.coordinator.members import Member
from nnunetv2.federated.coordinator.models.model_store import KeptModel
from nnunetv2.federated.coordinator.notifier import Notifier
from nnunetv2.federated.coordinator.storage.partial_uploads import PartialUploads
from nnunetv2.federated.protocol import api


@dataclass(frozen=True)
class Result:
    """A file that a site may download."""

    key: str
    """The exchange it comes from: a later round than asked for, where that one took place without the site."""
    path: Path
    digest: str


class SiteService(Protocol):
    """Everything that the requests of a site ask for. Methods are called on many threads.

    They raise RefusedError where a request is not to be granted, and OSError where trying again may help.
    """

    @property
    def notifier(self) -> Notifier:
        """Notified of every change that a site may wait for."""

    @property
    def uploads(self) -> PartialUploads:
        """The documents that are being received."""

    @property
    def settings(self) -> api.FederationSettings:
        """The settings that hold for all sites at the moment."""

    def authenticate(self, token: str) -> Member:
        """Return the member that a bearer token belongs to."""

    def count_traffic(self, member: str, key: str, *, received: int, sent: int) -> None:
        """Count the bytes of a member's request and its response, per exchange."""

    def roster(self) -> api.Roster:
        """Return the identities of the sites that take part."""

    def status(self, viewer: Member | None = None) -> api.Status:
        """Return the state of the federation, as much as this member may see."""

    def run_state(self, run: str) -> api.RunState:
        """Return how far a run is."""

    def run_of_plans(self, run: str, site: str, plans_name: str) -> str:
        """Return the name of the run that a site's training with these plans belongs to."""

    def outlooks(self) -> api.Outlooks:
        """Foresee the averages of every run, as far as they are known."""

    def declared_privacy(self) -> api.DeclaredPrivacy:
        """Return the privacy that sites have declared, of the runs where any has."""

    def find_model(self, run: str) -> Path:
        """Return where the model of a run is."""

    def fetch_model(self, run: str, *, member: str) -> KeptModel:
        """Return the model of a run for a member."""

    def act(self, run: str, action: api.RunAction, member: Member) -> api.RunState:
        """Apply a member's action to a run and return the run's state."""

    def report_failure(self, site: str, report: api.FailureReport) -> None:
        """Remember that a site cannot go on."""

    def note_rehearsal(self, site: str, size: int) -> None:
        """Note in the audit log that a site has rehearsed an upload."""

    def offer(self, key: str, site: str, digest: str, size: int) -> api.Receipt | None:
        """Return the receipt for a document already held; None if it is wanted."""

    def contribute(self, key: str, site: str, incoming: Path, digest: str, size: int) -> api.Receipt:
        """Take over a document that has been received completely; it is durable on return."""

    def result(self, key: str, site: str, *, changes: bool = False, since: str | None = None) -> Result | api.Waiting:
        """Return the result of an exchange, or the sites that it waits for.

        Args:
            changes: Whether the changes since the result before suffice, where weights travel as such.
            since: SHA-256 of the result before, as the site has received it: changes lead on from no other one. Sites
                of versions before 2.8.1+fed.4 do not say it.
        """
