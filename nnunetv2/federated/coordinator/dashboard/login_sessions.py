"""Manage login sessions of the dashboard: a token, or an invitation, becomes a cookie.

A session is a cookie that scripts cannot read, that no other site can make the browser send, and that lets its holder
look, nothing else: whoever steers a federation shows a token with each request. Sessions live in the memory of the
coordinator, which knows the SHA-256 of each cookie only; they end by themselves, with the credential, and when the
coordinator stops.
"""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass, replace
from threading import Lock
from typing import Annotated

from pydantic import Field

from nnunetv2.federated.coordinator.http.rate_limits import address_group
from nnunetv2.federated.coordinator.members import Member, hash_secret, require_role
from nnunetv2.federated.coordinator.service import Coordinator
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.protocol.api import JoinRequest
from nnunetv2.federated.protocol.messages import Finite, Part, SiteName, Text

SESSION_S = 12 * 3600.0
"""A session ends after a working day at the latest,"""
IDLE_S = 2 * 3600.0
"""and when nobody has looked for so long."""
MAX_SESSIONS = 50
"""Of one member; the one that was used least recently gives way."""
MAX_ATTEMPTS = 10
"""Failed logins from one address within `ATTEMPTS_S`; further ones are told to wait."""
ATTEMPTS_S = 300.0
MAX_ADDRESSES = 4096


class LoginRequest(Part):
    """Somebody wants to look at the page."""

    token: Annotated[str, Field(min_length=16, max_length=500)]
    invitation: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """The secret of an invitation that is used with this login, so that the token counts from now on."""


class Viewer(Part):
    """The person who looks at the page."""

    name: SiteName
    role: Text
    federation: Text
    expires: Finite
    """When the session ends, in seconds since 1970."""


@dataclass(frozen=True)
class Session:
    """One browser that has logged in."""

    name: str
    token_hash: str
    """Of the token it has logged in with: the session is good only as long as that token is."""
    expires: float
    last_used: float


class Attempts:
    """Limit the failed logins of each address. Not a lock: 2**256 tokens are.

    So a good token is let in whoever else is behind the same address.
    """

    def __init__(self) -> None:
        self._failures: dict[str, deque[float]] = {}

    def failed(self, address: str, now: float) -> None:
        """Remember a failed login.

        Raises RefusedError if the address has failed too often of late.
        """
        if address not in self._failures and len(self._failures) >= MAX_ADDRESSES:
            del self._failures[next(iter(self._failures))]  # the one that began first
        failures = self._failures.setdefault(address, deque(maxlen=MAX_ATTEMPTS))
        while failures and failures[0] <= now - ATTEMPTS_S:
            failures.popleft()
        if len(failures) >= MAX_ATTEMPTS:
            raise RefusedError(
                f"too many failed logins from {address}",
                f"Try again in {failures[0] + ATTEMPTS_S - now:.0f} seconds.",
                code="too_many_attempts",
            )
        failures.append(now)


class LoginSessions:
    """The sessions of all browsers. Safe for use by several threads."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._sessions: dict[str, Session] = {}
        self._attempts = Attempts()
        self._lock = Lock()

    def log_in(self, request: LoginRequest, *, address: str) -> tuple[str, Viewer]:
        """Begin a session.

        Args:
            address: Where the request comes from.

        Returns:
            The value of the cookie, and who has logged in.

        Raises:
            RefusedError: Token or invitation are no good, or those of a site.
        """
        now = self._coordinator.state.clock()
        try:
            member = self._enrol_or_authenticate(request)
            require_role(member, "observer", "operator")
        except RefusedError:
            with self._lock:
                self._attempts.failed(address_group(address), now)
            raise
        cookie = secrets.token_urlsafe(32)
        session = Session(member.name, hash_secret(request.token), now + SESSION_S, now)
        with self._lock:
            self._remove_expired(now)
            own = [key for key, one in self._sessions.items() if one.name == member.name]
            if len(own) >= MAX_SESSIONS:
                del self._sessions[min(own, key=lambda key: self._sessions[key].last_used)]
            self._sessions[hash_secret(cookie)] = session
        return cookie, self._viewer(member, session)

    def _enrol_or_authenticate(self, request: LoginRequest) -> Member:
        coordinator = self._coordinator
        if request.invitation is not None:
            name = request.token.partition(".")[0]
            if coordinator.members.role_of_invited(name, request.invitation) == "site":
                raise RefusedError(
                    f"this invitation is for site {name}, and it is still good",
                    "Use it on the site's machine: nnUNetv2_fed_join INVITE.",
                    code="forbidden",
                )
            coordinator.join(JoinRequest(invitation=request.invitation, token=request.token))
        return coordinator.authenticate(request.token)

    def viewer(self, cookie: str) -> Viewer:
        """Return whose session a cookie is, and until when. Raises as `member`."""
        return self._viewer(*self._resume(cookie))

    def member(self, cookie: str) -> Member:
        """Return whose session a cookie is.

        Raises:
            RefusedError: There is no such session any more; the code is `unauthorized`.
        """
        return self._resume(cookie)[0]

    def _resume(self, cookie: str) -> tuple[Member, Session]:
        now, key = self._coordinator.state.clock(), hash_secret(cookie)
        with self._lock:
            session = self._sessions.get(key)
            if session is None or not _is_alive(session, now):
                self._sessions.pop(key, None)
                raise RefusedError("nobody is logged in here", "Log in.", code="unauthorized")
            self._sessions[key] = session = replace(session, last_used=now)
        try:
            return self._coordinator.members.authenticate_hash(session.name, session.token_hash), session
        except RefusedError:
            self.log_out(cookie)
            raise

    def log_out(self, cookie: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(hash_secret(cookie), None)

    def count(self) -> int:
        """Return how many sessions there are."""
        with self._lock:
            self._remove_expired(self._coordinator.state.clock())
            return len(self._sessions)

    def _viewer(self, member: Member, session: Session) -> Viewer:
        return Viewer(
            name=member.name,
            role=member.role,
            federation=self._coordinator.settings.federation,
            expires=session.expires,
        )

    def _remove_expired(self, now: float) -> None:
        self._sessions = {key: session for key, session in self._sessions.items() if _is_alive(session, now)}


def _is_alive(session: Session, now: float) -> bool:
    return now < min(session.expires, session.last_used + IDLE_S)
