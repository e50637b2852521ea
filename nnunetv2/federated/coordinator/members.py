"""Know the sites of a federation: who has joined, whose token it is, what each has sent and when it was last seen."""
from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections import defaultdict

from nnunetv2.federated import bodies
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.store import SiteRecord, Store, Traffic

SHOWN_TRAFFIC = 1000
"""Entries of the status; the latest ones."""


def hash_secret(secret: str) -> str:
    """Return the form in which a secret of 32 random bytes is kept. No salt: nobody can guess 2**256 values."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_federation(store: Store, settings: bodies.FederationSettings, *, now: float) -> None:
    """Write a new federation, with one invitation per site."""
    invitations = {site: secrets.token_urlsafe(32) for site in settings.sites}
    records = [SiteRecord(site, secret, hash_secret(secret), None) for site, secret in invitations.items()]
    store.create(settings, records, now)


class Members:
    """The sites of one federation. Safe for use by several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sites = store.load_sites()
        self._traffic = defaultdict(Traffic, store.load_traffic())
        self._unsaved_traffic: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def join(self, invitation: str, token: str, *, now: float) -> tuple[str, bool]:
        """Let a site join with the secret of its invitation. Repeating it with the same token changes nothing.

        Returns:
            The site's name, and whether it is new.

        Raises:
            RefusedError: The invitation is not known, or was used with another token.
        """
        site, token_hash = token.partition(".")[0], hash_secret(token)
        with self._lock:
            record = self._sites.get(site)
            if record is None or not hmac.compare_digest(record.invitation_hash, hash_secret(invitation)):
                raise RefusedError("this invitation is not known here", "Ask the coordinating site for a new one.",
                                   code="invitation_unknown")
            if record.token_hash is None:
                self._store.save_token(site, token_hash, now)
                self._sites[site] = SiteRecord(site, None, record.invitation_hash, token_hash)
                return site, True
            if not hmac.compare_digest(record.token_hash, token_hash):
                raise RefusedError(f"the invitation of site {site} has been used already",
                                   "If that was not you, tell the coordinating site at once.", code="invitation_used")
            return site, False

    def authenticate(self, token: str) -> str:
        """Return the site that a bearer token belongs to.

        Raises:
            RefusedError: It belongs to none; the code is `unauthorized`.
        """
        site = token.partition(".")[0]
        record = self._sites.get(site)
        expected = record.token_hash if record is not None and record.token_hash is not None else ""
        if not hmac.compare_digest(expected, hash_secret(token)):
            raise RefusedError("the coordinator does not know this site's credential",
                               "Join with a new invitation: nnUNetv2_fed_join INVITE.", code="unauthorized")
        return site

    def open_invitations(self) -> dict[str, str]:
        """Return the secrets of the invitations that nobody has used: site -> secret."""
        return {site.name: site.invitation for site in self._sites.values() if site.invitation is not None}

    # --------------------------------------------------------------------------------------------------- traffic
    def count(self, site: str, key: str, traffic: Traffic) -> None:
        """Add to the counters of a site; the key "" is for everything but gatherings."""
        with self._lock:
            self._traffic[site, key] += traffic
            self._unsaved_traffic.add((site, key))

    def save_traffic(self) -> None:
        """Write the counters that have changed."""
        with self._lock:
            counters = {place: self._traffic[place] for place in self._unsaved_traffic}
            self._unsaved_traffic.clear()
        self._store.save_traffic(counters)

    def status(self) -> tuple[bodies.SiteStatus, ...]:
        """Say who has joined, and what each site has sent and been sent."""
        with self._lock:
            totals = defaultdict(Traffic)
            for (site, _), count in self._traffic.items():
                totals[site] += count
        return tuple(bodies.SiteStatus(
            site=record.name, joined=record.token_hash is not None, last_seen=totals[record.name].last_seen or None,
            bytes_received=totals[record.name].received, bytes_sent=totals[record.name].sent)
            for record in self._sites.values())

    def traffic_status(self) -> tuple[bodies.TrafficStatus, ...]:
        """Say what each site has sent and been sent for the gatherings that were busy last."""
        with self._lock:
            counters = [(count.last_seen, site, key, count) for (site, key), count in self._traffic.items() if key]
        latest = sorted(counters, key=lambda entry: entry[:3])[-SHOWN_TRAFFIC:]
        return tuple(bodies.TrafficStatus(site=site, key=key, bytes_received=count.received, bytes_sent=count.sent)
                     for _, site, key, count in latest)
