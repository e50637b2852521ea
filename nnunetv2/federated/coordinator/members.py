"""Manage the members of a federation: invitations, roles, tokens, traffic.

    invited --joins with the secret of an invitation, and a token of its own--> active --is revoked--> revoked
       ^                                                                          |                       |
       +------------------------------ is invited again --------------------------+-----------------------+

An invitation is good for one member, once, until it expires. A member that is invited again keeps its old token until
it joins with the new invitation; then only the new token counts.

Where sites aggregate securely, each brings the public part of its identity when it joins. The coordinator hands these
out and remembers them, also of those that were revoked; the sites check among themselves that they are right.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from nnunetv2.federated.coordinator.state import FederationState
from nnunetv2.federated.coordinator.storage.store import InvitationRecord, MemberRecord, Role, Store, Traffic
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.privacy.secure_aggregation.protocol import check_most
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.messages import MAX_SITES

SHOWN_TRAFFIC = 1000
"""Entries of the status; the latest ones."""
BUSY_GATHERINGS = 5
"""Exchanges whose traffic is shown: those that were busy last, so that a status costs the same after any round."""
INVITATION_LIFETIME_S = 14 * 86_400.0
MEMBERSHIP = "membership"
"""Under this name, the store keeps how sites become members, where that is not by invitations."""
Membership = Literal["invitations", "engine"]
"""Sites join with invitations and prove themselves by tokens; or an engine knows them, and no request over HTTP is
theirs."""
LOCAL_OPERATOR = "operator"
"""Whoever may read the federation's folder operates it; the name is nobody else's."""


@dataclass(frozen=True)
class Member:
    """The sender of a request."""

    name: str
    role: Role


def require_role(member: Member, *roles: Role) -> str:
    """Return the name of a member.

    Raises RefusedError if its role does not allow the request.
    """
    if member.role not in roles:
        raise RefusedError(
            f"{member.name} is {'an' if member.role[0] == 'o' else 'a'} {member.role}: this is for "
            f"{' and '.join(f'{role}s' for role in roles)}",
            code="forbidden",
        )
    return member.name


def hash_secret(secret: str) -> str:
    """Return the SHA-256 of a secret of 32 random bytes, which needs no salt."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_invitation(member: str, *, now: float, lifetime_s: float) -> InvitationRecord:
    """Make an invitation with a fresh secret."""
    secret = secrets.token_urlsafe(32)
    return InvitationRecord(hash_secret(secret), member, secret, now + lifetime_s)


def create_federation(
    store: Store,
    settings: api.FederationSettings,
    *,
    now: float,
    lifetime_s: float = INVITATION_LIFETIME_S,
    membership: Membership = "invitations",
) -> None:
    """Write a new federation, with one invitation per site unless an engine knows them.

    Raises:
        FederationError: A site has the name of the operator.
    """
    for site in settings.sites:
        _check_name(site)
    if membership != membership_of(store):  # left by a founding that a crash has cut short, else not there
        store.save_meta(MEMBERSHIP, membership)
    if membership == "engine":
        store.create(settings, [_engine_member(site, now) for site in settings.sites], [], now)
        return
    store.create(
        settings,
        [MemberRecord(site, "site", "invited", None, now) for site in settings.sites],
        [new_invitation(site, now=now, lifetime_s=lifetime_s) for site in settings.sites],
        now,
    )


def membership_of(store: Store) -> Membership:
    """Return how sites become members of the federation in a store."""
    return "engine" if store.load_meta(MEMBERSHIP) == "engine" else "invitations"


def _engine_member(site: str, now: float) -> MemberRecord:
    """Return a site that an engine knows: it takes part, and has no token."""
    return MemberRecord(site, "site", "active", None, now)


class Members:
    """The members of one federation. Safe for use by several threads."""

    def __init__(self, state: FederationState) -> None:
        self._state = state
        self._totals = defaultdict(Traffic, state.store.load_traffic_totals())
        self._traffic = state.store.load_recent_traffic(BUSY_GATHERINGS)
        """Key -> site -> counters, of the exchanges that were busy last, the latest last."""
        self._unsaved_traffic: defaultdict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self._lock = threading.Lock()
        self._local_operator = ""
        self._membership = membership_of(state.store)

    # ------------------------------------------------------------------------------------------------- enrolment
    def invite(self, name: str, role: Role, *, by: str, lifetime_s: float = INVITATION_LIFETIME_S) -> str:
        """Invite somebody new, or somebody again whose credential is lost or was revoked.

        A new site is expected from now on. The caller holds the lock "settings".

        Returns:
            The secret of the invitation. Empty for a site that an engine knows: it takes part again at once.

        Raises:
            RefusedError: The name is taken by another role, or by a member that differs in upper and lower case only;
                or there are as many sites as can be; or an engine is to bring the site, and it was not revoked.
        """
        with self._lock:
            now, settings = self._state.clock(), self._state.settings
            present = self._state.member_records.get(name)
            if role == "site" and self._membership == "engine":
                self._let_back_in(name, by=by)
                return ""
            known = None if present is None else present.identity
            newcomer = MemberRecord(name, role, "invited", None, now, known)
            self._check_places([newcomer])
            if present is None or present.state == "revoked":
                present = newcomer
            invitation = new_invitation(name, now=now, lifetime_s=lifetime_s)
            self._state.save_members(
                [present],
                [*self._withdrawn(name), invitation],
                settings=_with_sites(settings, name) if role == "site" else settings,
                event=self._state.event(
                    "invitation", by, None, {"member": name, "role": role, "expires": invitation.expires}
                ),
            )
            assert invitation.secret is not None  # it is new
            return invitation.secret

    def _let_back_in(self, name: str, *, by: str) -> None:
        """Expect a site again that an engine knows and an operator has revoked."""
        present = self._state.member_records.get(name)
        if present is None or present.state != "revoked":
            raise RefusedError(
                f"the sites of this federation come through NVFlare: {name} cannot be invited",
                "Let the operator of the NVFlare network add it; the next job admits it. "
                "One that was revoked here is let back in by an invitation.",
                code="forbidden",
            )
        back = replace(present, role="site", state="active", since=self._state.clock())
        self._check_places([back])
        if back.identity is not None:
            self._check_identity(back, back.identity)  # another site may have brought it since
        self._state.save_members(
            [back],
            [],
            settings=_with_sites(self._state.settings, name),
            event=self._state.event("admission", by, None, {"sites": [name]}),
        )

    def admit(self, names: Iterable[str], *, by: str) -> tuple[str, ...]:
        """Expect further sites that an engine knows, and return those that are new; see `invite`.

        One that was revoked stays so until an operator invites it: an operator has said it. The caller holds the lock
        "settings".

        Raises:
            RefusedError: As `invite` does; then none is admitted.
        """
        with self._lock:
            settings, now = self._state.settings, self._state.clock()
            newcomers = [_engine_member(name, now) for name in sorted(set(names)) if not self._is_site(name)]
            if not newcomers:
                return ()
            self._check_places(newcomers)
            new = tuple(one.name for one in newcomers)
            self._state.save_members(
                newcomers,
                [],
                settings=_with_sites(settings, *new),
                event=self._state.event("admission", by, None, {"sites": list(new)}),
            )
            return new

    def _is_site(self, name: str) -> bool:
        present = self._state.member_records.get(name)
        return present is not None and present.role == "site"

    def _check_places(self, newcomers: Sequence[MemberRecord]) -> None:
        """Raise RefusedError unless all have names of their own and a place among the sites, if they are some.

        Args:
            newcomers: Members that are to be, or to be again.
        """
        known, settings = self._state.member_records, self._state.settings
        everybody = {**{one.name: one for one in newcomers}, **known}
        for one in newcomers:
            _check_name(one.name)
            alike = [other for name, other in everybody.items() if name.lower() == one.name.lower()]
            taken_by = [other for other in alike if other.name != one.name or other.role != one.role]
            if taken_by:
                raise RefusedError(
                    f"the name {one.name} is taken: there is {_describe(taken_by[0])}",
                    "Choose another name.",
                    code="name_taken",
                )
        sites = {one.name for one in newcomers if one.role == "site"}
        num_known, num_new = sum(one.role == "site" for one in known.values()), len(sites - known.keys())
        if num_new and num_known + num_new > MAX_SITES:
            raise RefusedError(
                f"there are {num_known} sites, among them those that were revoked; {num_new} more are not possible",
                "Start another federation.",
                code="too_many_sites",
            )
        if settings.secure is not None and not sites <= set(settings.sites):
            check_most(len(sites.union(settings.sites)))  # with one too many, a run at work could mask no further round

    def identify(self, name: str, identity: str) -> None:
        """Note the identity of a site that an engine knows, where the federation aggregates securely.

        Raises:
            RefusedError: It is that of another site, or no identity is wanted.
        """
        with self._lock:
            member = self._state.member_records[name]
            if member.identity == identity:
                return
            self._check_identity(member, identity)
            told = {} if member.identity is None else {"identity_before": member.identity}
            self._state.save_members(
                [replace(member, identity=identity)],
                [],
                event=self._state.event("join", name, None, {"role": member.role, "identity": identity, **told}),
            )

    def revoke(self, name: str, *, by: str) -> None:
        """Take a member's credential and invitations away, at once.

        A site that was revoked is not among the sites any more. The caller holds the lock "settings".

        Raises:
            RefusedError: There is no such member.
        """
        with self._lock:
            if name not in self._state.member_records:
                raise RefusedError(f"there is no member {name[:80]!r}", code="unknown_member")
            settings = self._state.settings
            settings = settings.model_copy(update={"sites": tuple(site for site in settings.sites if site != name)})
            self._state.save_members(
                [
                    replace(
                        self._state.member_records[name], state="revoked", token_hash=None, since=self._state.clock()
                    )
                ],
                self._withdrawn(name),
                settings=settings,
                event=self._state.event("revocation", by, None, {"member": name}),
            )

    def join(self, invitation: str, token: str, identity: str | None = None) -> tuple[Member, bool]:
        """Let a member join with the secret of its invitation.

        Repeating it with the same token changes nothing.

        Args:
            identity: Public part of the key that it signs with.

        Returns:
            Who it is, and whether it is new.

        Raises:
            RefusedError: The invitation is not known, has expired, or was used with another token; an identity is
                missing or not wanted, or that of another site.
        """
        name, token_hash, now = token.partition(".")[0], hash_secret(token), self._state.clock()
        with self._lock:
            record, member = self._invited(name, invitation)
            if record.token_hash is not None:
                _check_is_same_join(record, member, token_hash, identity)
                return Member(name, member.role), False
            self._check_can_be_used(record, member, token_hash, now)
            self._check_identity(member, identity)
            told = {} if identity is None else {"identity": identity}
            if identity is not None and member.identity not in (None, identity):
                told["identity_before"] = str(member.identity)
            self._state.save_members(
                [replace(member, state="active", token_hash=token_hash, since=now, identity=identity)],
                [replace(record, secret=None, token_hash=token_hash)],
                event=self._state.event("join", name, None, {"role": member.role, **told}),
            )
            return Member(name, member.role), True

    def _invited(self, name: str, invitation: str) -> tuple[InvitationRecord, MemberRecord]:
        """Return an invitation and its member.

        Raises:
            RefusedError: There is no such invitation of this member.
        """
        # Looked up by hash: how long that takes tells nothing about the secret.
        record = self._state.invitation_records.get(hash_secret(invitation))
        member = self._state.member_records.get(name)
        if record is None or member is None or record.member != name:
            raise RefusedError(
                "this invitation is not known here",
                "Ask the coordinating site for a new one.",
                code="invitation_unknown",
            )
        return record, member

    def _check_can_be_used(self, record: InvitationRecord, member: MemberRecord, token_hash: str, now: float) -> None:
        """Raise RefusedError unless an invitation is still open, and the token a new one."""
        if record.secret is None or now >= record.expires:
            raise RefusedError(
                f"the invitation of {member.role} {member.name} has expired or was withdrawn",
                "Ask the coordinating site for a new one.",
                code="invitation_expired",
            )
        if any(token_hash == one.token_hash for one in self._state.invitation_records.values()):
            raise RefusedError(
                f"the token of {member.role} {member.name} has been used before: a new invitation needs a new one",
                "Join with --replace.",
                code="token_reused",
            )

    def needs_identity(self, name: str) -> bool:
        """Return whether a member is a site of a federation that aggregates securely."""
        return self._state.settings.secure is not None and self.role_of(name) == "site"

    def identities(self) -> dict[str, str]:
        """Return the identities of the sites that take part, by name."""
        with self._lock:
            return {
                record.name: record.identity
                for record in sorted(self._state.member_records.values(), key=lambda one: one.name)
                if record.state == "active" and record.identity is not None
            }

    def identity_of(self, name: str) -> str | None:
        """Return the last known identity of a member, also of one that was revoked."""
        record = self._state.member_records.get(name)
        return None if record is None else record.identity

    def _check_identity(self, member: MemberRecord, identity: str | None) -> None:
        """Raise RefusedError unless a member brings the identity that it needs, and nobody else's."""
        if not self.needs_identity(member.name):
            if identity is not None:
                raise RefusedError(
                    f"{member.role} {member.name} brings an identity, which nobody here asks for",
                    "Ask the coordinating site for a new invitation.",
                    code="invalid",
                )
            return
        if identity is None:
            raise RefusedError(
                "this federation aggregates securely, for which each site brings an identity when it joins",
                "Use matching versions of the software, and the invitation as it was sent.",
                code="identity_missing",
            )
        others = [
            one
            for one in self._state.member_records.values()
            if one.identity == identity and one.name != member.name and one.state != "revoked"
        ]
        if others:
            raise RefusedError(
                f"the identity of site {member.name} is that of site {others[0].name} already",
                "Each site joins from a machine of its own, or with a file of its own in nnUNet_fed_site.",
                code="identity_taken",
            )

    def authenticate(self, token: str) -> Member:
        """Return the member that a bearer token belongs to.

        Raises:
            RefusedError: It belongs to none, or to nobody any more; the code is `unauthorized`.
        """
        return self.authenticate_hash(token.partition(".")[0], hash_secret(token))

    def authenticate_hash(self, name: str, token_hash: str) -> Member:
        """Return the member of this name if its token has this hash now; see `authenticate`."""
        if name == LOCAL_OPERATOR and hmac.compare_digest(self._local_operator, token_hash):
            return Member(name, "operator")
        record = self._state.member_records.get(name)
        expected = record.token_hash if record is not None and record.token_hash is not None else ""
        is_known = hmac.compare_digest(expected, token_hash) and record is not None
        if not is_known or record is None or (record.role == "site" and self._membership == "engine"):
            raise RefusedError(
                "the coordinator does not know this credential, or it was revoked",
                "Ask the coordinating site for a new invitation, and join with it: nnUNetv2_fed_join INVITE.",
                code="unauthorized",
            )
        return Member(record.name, record.role)

    def appoint_local_operator(self, token: str) -> None:
        """Accept this token as the local operator's until this process ends."""
        self._local_operator = hash_secret(token)

    def open_invitations(self, now: float) -> list[InvitationRecord]:
        """Return the invitations that may still be sent out, by member."""
        with self._lock:
            return sorted(
                (
                    one
                    for one in self._state.invitation_records.values()
                    if one.secret is not None and now < one.expires
                ),
                key=lambda one: one.member,
            )

    def role_of_invited(self, name: str, invitation: str) -> Role | None:
        """Return the role that the secret of an invitation gives.

        None if it is not the member's. `join` checks whether the invitation is still good.
        """
        record = self._state.invitation_records.get(hash_secret(invitation))
        return self.role_of(name) if record is not None and record.member == name else None

    def role_of(self, name: str) -> Role | None:
        """Return the role of a member that is not revoked, or None."""
        record = self._state.member_records.get(name)
        return None if record is None or record.state == "revoked" else record.role

    def is_revoked(self, name: str) -> bool:
        """Return whether there is such a member whose credential was revoked."""
        return name in self._state.member_records and self._state.member_records[name].state == "revoked"

    def _withdrawn(self, name: str) -> list[InvitationRecord]:
        return [
            replace(one, secret=None)
            for one in self._state.invitation_records.values()
            if one.member == name and one.secret is not None
        ]

    # --------------------------------------------------------------------------------------------------- traffic
    def count(self, site: str, key: str, traffic: Traffic) -> None:
        """Add to the counters of a site; the key "" is for everything but exchanges."""
        with self._lock:
            self._totals[site] += traffic
            self._unsaved_traffic[site, key] += traffic
            if key:
                counters = self._traffic[key] = self._traffic.pop(key, {})
                counters[site] = counters.get(site, Traffic()) + traffic
                if len(self._traffic) > BUSY_GATHERINGS:
                    del self._traffic[next(iter(self._traffic))]

    def save_traffic(self) -> None:
        """Write the traffic that was counted since the last time."""
        with self._lock:
            counted, self._unsaved_traffic = self._unsaved_traffic, defaultdict(Traffic)
        try:
            self._state.store.add_traffic(counted)
        except OSError:
            with self._lock:
                for place, traffic in counted.items():
                    self._unsaved_traffic[place] += traffic
            raise

    def status(self) -> tuple[api.SiteStatus, ...]:
        """Return the sites, and the bytes that each has sent and been sent."""
        with self._lock:
            return tuple(
                api.SiteStatus(
                    site=record.name,
                    joined=record.state == "active",
                    state=record.state,
                    last_seen=total.last_seen or None,
                    bytes_received=total.received,
                    bytes_sent=total.sent,
                )
                for record in self._state.member_records.values()
                if record.role == "site"
                for total in (self._totals.get(record.name, Traffic()),)
            )

    def traffic_status(self) -> tuple[api.TrafficStatus, ...]:
        """Return the traffic of each site in the exchanges that were busy last."""
        with self._lock:
            counters = [
                (count.last_seen, site, key, count)
                for key, counts in self._traffic.items()
                for site, count in counts.items()
            ]
        latest = sorted(counters, key=lambda entry: entry[:3])[-SHOWN_TRAFFIC:]
        return tuple(
            api.TrafficStatus(site=site, key=key, bytes_received=count.received, bytes_sent=count.sent)
            for _, site, key, count in latest
        )


def _check_is_same_join(record: InvitationRecord, member: MemberRecord, token_hash: str, identity: str | None) -> None:
    """Raise RefusedError unless a join repeats the one that has used the invitation."""
    if record.token_hash != token_hash or member.token_hash != token_hash:
        raise RefusedError(
            f"the invitation of {member.role} {member.name} has been used already",
            "If that was not you, tell the coordinating site at once.",
            code="invitation_used",
        )
    if member.identity != identity:
        raise RefusedError(
            f"site {member.name} has joined with another identity",
            "Ask the coordinating site for a new invitation.",
            code="identity_changed",
        )


def _with_sites(settings: api.FederationSettings, *names: str) -> api.FederationSettings:
    """Return the settings with these sites among the others."""
    return settings.model_copy(update={"sites": tuple(sorted({*settings.sites, *names}))})


def _check_name(name: str) -> None:
    if name.lower() == LOCAL_OPERATOR:
        raise RefusedError(
            f"the name {name} is that of the operator on the coordinator's machine",
            "Choose another name.",
            code="name_taken",
        )


def _describe(record: MemberRecord) -> str:
    return f"{'an' if record.role[0] == 'o' else 'a'} {record.role} of that name ({record.name}, {record.state})"
