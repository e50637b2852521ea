"""The coordinator keeps the identities of sites, and hands them out; in clear federations there are none."""

import json
import urllib.request
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_federation import make_settings, served
from frozen_federation import Federation

from nnunetv2.federated.coordinator.storage.backup import backup, restore
from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.privacy.identities import public_of
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.strict_json import encode_json
from nnunetv2.federated.site.credential import load_credential
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.identity import identity_path, load_identity

SITES = ("A", "B", "C")
PUBLIC = {site: public_of(Ed25519PrivateKey.generate()) for site in (*SITES, "A anew")}


@pytest.fixture
def federation(tmp_path):
    federation = Federation(tmp_path / "federation", sites=SITES, secure={"k": 3})
    yield federation
    federation.store.close()


def secret_of(federation, site: str) -> str:
    return next(
        one.secret for one in federation.coordinator.members.open_invitations(federation.now) if one.member == site
    )


def enter(federation, site: str, identity: str | None, *, secret: str | None = None, token: str = "0123456789abcdef"):
    request = api.JoinRequest(
        invitation=secret or secret_of(federation, site), token=f"{site}.{token}", identity=identity
    )
    return federation.coordinator.join(request)


def refused(*arguments, **options) -> str:
    with pytest.raises(RefusedError) as info:
        enter(*arguments, **options)
    return info.value.code


def join_events(federation) -> list[dict]:
    return [dict(event.detail) for event in federation.store.load_events("join")]


# -------------------------------------------------------------------------------------------------------------- roster
def test_the_roster_has_the_sites_that_have_joined(federation):
    assert federation.coordinator.roster().sites == {}
    for site in "CA":
        enter(federation, site, PUBLIC[site])
    assert list(federation.coordinator.roster().sites.items()) == [("A", PUBLIC["A"]), ("C", PUBLIC["C"])]
    assert join_events(federation) == [{"role": "site", "identity": PUBLIC[site]} for site in "CA"]


def test_a_site_without_an_identity_is_refused_and_its_invitation_stays_good(federation):
    assert refused(federation, "A", None) == "identity_missing"
    enter(federation, "A", PUBLIC["A"])


def test_an_identity_is_that_of_one_site(federation):
    enter(federation, "A", PUBLIC["A"])
    assert refused(federation, "B", PUBLIC["A"]) == "identity_taken"
    enter(federation, "B", PUBLIC["B"])


def test_joining_again_with_the_same_token_needs_the_same_identity(federation):
    secret = secret_of(federation, "A")
    enter(federation, "A", PUBLIC["A"], secret=secret)
    enter(federation, "A", PUBLIC["A"], secret=secret)
    assert refused(federation, "A", PUBLIC["A anew"], secret=secret) == "identity_changed"
    assert federation.coordinator.roster().sites == {"A": PUBLIC["A"]}


@pytest.mark.parametrize("is_revoked", [False, True])
def test_a_site_that_joins_again_keeps_its_identity(federation, is_revoked):
    enter(federation, "A", PUBLIC["A"])
    if is_revoked:
        federation.coordinator.revoke("A", by="boss")
        assert federation.coordinator.roster().sites == {}
    secret = federation.coordinator.invite("A", "site", by="boss")
    assert federation.coordinator.roster().sites == ({} if is_revoked else {"A": PUBLIC["A"]})
    enter(federation, "A", PUBLIC["A"], secret=secret, token="another-0123456789")
    assert federation.coordinator.roster().sites == {"A": PUBLIC["A"]}
    assert not any("another identity" in line for line in federation.lines)


@pytest.mark.parametrize("is_revoked", [False, True])
def test_a_site_that_joins_again_with_another_identity_is_in_the_log(federation, is_revoked):
    enter(federation, "A", PUBLIC["A"])
    if is_revoked:
        federation.coordinator.revoke("A", by="boss")
    secret = federation.coordinator.invite("A", "site", by="boss")
    enter(federation, "A", PUBLIC["A anew"], secret=secret, token="another-0123456789")
    assert federation.coordinator.roster().sites == {"A": PUBLIC["A anew"]}
    assert join_events(federation)[-1] == {"role": "site", "identity": PUBLIC["A anew"], "identity_before": PUBLIC["A"]}
    assert any("site A has another identity than before" in line for line in federation.lines)


def test_a_site_may_come_back_under_another_name(federation):
    enter(federation, "A", PUBLIC["A"])
    federation.coordinator.revoke("A", by="boss")
    secret = federation.coordinator.invite("D", "site", by="boss")
    enter(federation, "D", PUBLIC["A"], secret=secret)
    assert federation.coordinator.roster().sites == {"D": PUBLIC["A"]}


def test_observers_and_operators_have_no_identity(federation):
    for name, role in (("eve", "observer"), ("olga", "operator")):
        assert not federation.coordinator.members.needs_identity(name)
        secret = federation.coordinator.invite(name, role, by="boss")
        assert refused(federation, name, PUBLIC["A"], secret=secret) == "invalid"
        enter(federation, name, None, secret=secret)
    assert federation.coordinator.roster().sites == {}


# -------------------------------------------------------------------------------------------------- restart, backup
def test_identities_outlast_a_restart_a_reset_and_a_backup(tmp_path):
    federation = Federation(tmp_path / "federation", sites=SITES, secure={"k": 3})
    for site in SITES:
        enter(federation, site, PUBLIC[site])
    federation.coordinator.revoke("C", by="boss")
    backup(tmp_path / "federation", tmp_path / "backup.tar")
    federation.store.close()
    restore(tmp_path / "backup.tar", tmp_path / "restored")
    for folder in ("federation", "restored"):
        again = Federation(tmp_path / folder)
        assert again.coordinator.roster().sites == {site: PUBLIC[site] for site in "AB"}
        assert again.coordinator.members.identity_of("C") == PUBLIC["C"]
        again.store.close()


# ---------------------------------------------------------------------------------------------------- clear federations
def test_in_clear_nobody_brings_an_identity(tmp_path):
    federation = Federation(tmp_path / "federation", sites=SITES)
    assert refused(federation, "A", PUBLIC["A"]) == "invalid"
    enter(federation, "A", None)
    assert federation.coordinator.roster().sites == {}
    assert join_events(federation) == [{"role": "site"}]
    federation.store.close()


def test_in_clear_a_join_has_the_bytes_that_it_always_had():
    request = api.JoinRequest(invitation="i", token="t" * 16)
    assert encode_json(request) == b'{"protocol":1,"invitation":"i","token":"tttttttttttttttt"}'


# ---------------------------------------------------------------------------------------------------------- over HTTP
def test_sites_join_with_an_identity_and_read_the_roster(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=SITES, secure={"k": 3})) as federation:
        for site in SITES:
            with federation.client(site) as client:
                roster = client.roster()
        assert roster.sites == {site: public_of(load_identity(federation.credential_file(site))) for site in SITES}
        assert federation.credential("A").secure == 3
        request = urllib.request.Request(f"{federation.url}/v1/roster")
        with pytest.raises(urllib.error.HTTPError) as info:
            urllib.request.urlopen(request)
        assert info.value.code == 401


def test_a_site_that_joins_again_shows_the_same_identity_unless_it_was_lost(tmp_path):
    with served(tmp_path / "federation", make_settings(sites=SITES, secure={"k": 3})) as federation:
        path = federation.credential_file("A")
        federation.credential("A")
        before = federation.coordinator.roster().sites["A"]
        for lost in (False, True):
            if lost:
                identity_path(path).unlink()
            federation.coordinator.invite("A", "site", by="boss")
            join(federation.invitation("A"), path=path)
            assert (federation.coordinator.roster().sites["A"] == before) is not lost
        assert federation.coordinator.roster().sites["A"] == public_of(load_identity(path))
        assert json.loads(path.read_text())["secure"] == 3
        assert load_credential(path) == replace(federation.credential("A"), **_changing(load_credential(path)))


def _changing(credential) -> dict:
    return {"token": credential.token, "joined_with": credential.joined_with}


def test_no_more_sites_are_invited_than_can_mask_with_each_other(tmp_path):
    """One too many would be admitted to a run at work, whose next round could not be masked any more."""
    names = tuple(f"S{number:02}" for number in range(64))
    federation = Federation(tmp_path / "federation", sites=names, secure={"k": 3})
    with pytest.raises(RefusedError, match="64 sites at most, not for 65") as info:
        federation.coordinator.invite("T", "site", by="boss")
    assert info.value.code == "too_many_sites_for_secure" and len(federation.coordinator.settings.sites) == 64
    federation.coordinator.invite("watcher", "observer", by="boss")
    for name in names[:-1]:
        federation.coordinator.revoke(name, by="boss")
    federation.coordinator.invite("T", "site", by="boss")  # there are two now, and others may follow
    federation.store.close()
