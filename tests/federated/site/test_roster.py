"""A site remembers who the others are, and refuses whoever takes their place."""

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from fake_federation import in_threads

from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.privacy.identities import public_of, roster_number, sign_run_key
from nnunetv2.federated.site.credential import SiteCredential
from nnunetv2.federated.site.identity import identity_path, load_identity, make_identity, run_key
from nnunetv2.federated.site.roster import load_roster, roster_path, trusted_keys, verify

CREDENTIAL = SiteCredential("http://127.0.0.1:1", "federation-1", "A", "A.x", secure=3)
GATHERING = "runs/r/registration"


class Sites:
    """Site A with its files, and others that are keys only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "site.json"
        make_identity(self.path)
        self.others = {site: Ed25519PrivateKey.generate() for site in "BCD"}

    def keys(self, *, sites: str = "ABCD", **others):
        """Return the run keys of sites, as an honest coordinator would tell them but for `others`."""
        keys = {"A": run_key("federation-1", GATHERING, self.path)[1]}
        keys |= {site: signed_by(identity) for site, identity in (self.others | others).items()}
        return {site: keys[site] for site in keys if site in sites or site in others}

    def identities(self, **others) -> dict[str, str]:
        return {site: key.identity for site, key in self.keys(**others).items()}

    def trust(self, keys, **changes):
        return trusted_keys(keys, replace(CREDENTIAL, **changes), gathering=GATHERING, credential_file=self.path)

    def verify(self, identities, number=None):
        number = number or roster_number("federation-1", identities)
        verify(identities, number, CREDENTIAL, self.path)


def signed_by(identity):
    return sign_run_key(identity, X25519PrivateKey.generate(), federation="federation-1", gathering=GATHERING)


@pytest.fixture
def sites(tmp_path, monkeypatch) -> Sites:
    monkeypatch.delenv("nnUNet_fed_trust", raising=False)
    return Sites(tmp_path)


@pytest.fixture
def verified(monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_fed_trust", "verified")


def refusal_of(function, *arguments) -> RefusedError:
    with pytest.raises(RefusedError) as info:
        function(*arguments)
    return info.value


# ---------------------------------------------------------------------------------------------------------- first use
def test_identities_are_pinned_when_they_are_first_seen(sites):
    found = sites.trust(sites.keys())
    assert (found.mode, found.new) == ("first_use", ("A", "B", "C", "D"))
    assert "as first seen, not verified by people" in str(found) and "A, B, C, D" in str(found)
    assert found.identities["B"] == sites.others["B"].public_key().public_bytes_raw()
    assert load_roster("federation-1", sites.path).identities == sites.identities()
    again = sites.trust(sites.keys())
    assert again.new == () and "first time" not in str(again)


def test_newcomers_are_pinned_beside_the_others(sites):
    sites.trust(sites.keys(sites="ABC"))
    assert sites.trust(sites.keys(E=Ed25519PrivateKey.generate())).new == ("D", "E")


def test_a_swapped_identity_is_refused_with_the_remedy_and_changes_nothing(sites):
    sites.trust(sites.keys())
    before = roster_path(sites.path).read_bytes()
    error = refusal_of(sites.trust, sites.keys(C=Ed25519PrivateKey.generate()))
    assert error.code == "identity_changed"
    assert "site C has another identity" in error.message and "nnUNetv2_fed_roster --verified" in error.remedy
    assert roster_path(sites.path).read_bytes() == before


def test_a_swapped_run_key_is_refused_even_at_first_sight(sites):
    keys = sites.keys()
    keys["B"] = keys["B"].model_copy(update={"exchange_key": public_of(X25519PrivateKey.generate())})
    assert refusal_of(sites.trust, keys).code == "run_key_forged"
    assert not roster_path(sites.path).exists()


@pytest.mark.parametrize("told", ["another", "none"])
def test_somebody_else_in_place_of_this_site_is_refused(sites, told):
    keys = sites.keys()
    if told == "another":
        keys["A"] = signed_by(Ed25519PrivateKey.generate())
    else:
        del keys["A"]
    error = refusal_of(sites.trust, keys)
    assert error.code == "identity_changed" and "for this site, A" in error.message


def test_a_site_under_two_names_is_refused(sites):
    error = refusal_of(sites.trust, sites.keys(E=sites.others["B"]))
    assert error.code == "identity_repeated" and "B and E" in error.message


def test_another_federation_begins_with_an_empty_memory(sites):
    sites.trust(sites.keys())
    assert load_roster("federation-2", sites.path).identities == {}


def test_two_runs_that_begin_together_pin_the_sites_of_both(sites):
    newcomers = {site: Ed25519PrivateKey.generate() for site in "EFGHIJKL"}
    in_threads(
        *[
            lambda site=site, identity=identity: sites.trust(sites.keys(sites="A", **{site: identity}))
            for site, identity in newcomers.items()
        ]
    )
    assert newcomers.keys() <= load_roster("federation-1", sites.path).identities.keys()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": 2}', b"\xff"])
def test_a_damaged_memory_stops_everything(sites, content):
    roster_path(sites.path).write_bytes(content)
    with pytest.raises(FederationError, match=r"roster\.json cannot be read.*compare the number"):
        sites.trust(sites.keys())
    assert roster_path(sites.path).read_bytes() == content


def test_a_site_that_lost_its_identity_says_so(sites):
    keys = sites.keys()
    identity_path(sites.path).unlink()
    with pytest.raises(FederationError, match="this site has no identity"):
        sites.trust(keys)


# ----------------------------------------------------------------------------------------------------------- verified
def test_nothing_is_trusted_before_people_have_compared_the_number(sites, verified):
    error = refusal_of(sites.trust, sites.keys())
    assert error.code == "roster_unverified" and "--verified NUMBER" in error.remedy
    assert not roster_path(sites.path).exists()
    sites.verify(sites.identities())
    found = sites.trust(sites.keys())
    assert found.mode == "verified" and str(found) == "identities of the sites: verified by people (A, B, C, D)"


def test_sites_that_stay_away_need_no_other_look(sites, verified):
    sites.verify(sites.identities())
    sites.trust(sites.keys(sites="ABC"))


def test_a_site_that_was_added_needs_another_look(sites, verified):
    sites.verify(sites.identities())
    newcomer = Ed25519PrivateKey.generate()
    error = refusal_of(sites.trust, sites.keys(E=newcomer))
    assert error.code == "roster_unverified" and "identity of E (" in error.message
    sites.verify(sites.identities(E=newcomer))
    sites.trust(sites.keys(E=newcomer))


def test_a_site_that_has_joined_anew_is_refused_until_the_new_number_is_confirmed(sites, verified):
    sites.verify(sites.identities())
    anew = Ed25519PrivateKey.generate()
    assert refusal_of(sites.trust, sites.keys(C=anew)).code == "identity_changed"
    sites.verify(sites.identities(C=anew))
    sites.trust(sites.keys(C=anew))
    assert refusal_of(sites.trust, sites.keys()).code == "identity_changed"


def test_confirming_a_number_also_mends_what_was_pinned_at_first_use(sites):
    sites.trust(sites.keys())
    anew = Ed25519PrivateKey.generate()
    sites.verify(sites.identities(C=anew))
    assert sites.trust(sites.keys(C=anew)).new == ()


def test_the_number_of_another_roster_is_not_accepted(sites):
    honest = roster_number("federation-1", sites.identities())
    error = refusal_of(sites.verify, sites.identities(E=Ed25519PrivateKey.generate()), honest)
    assert error.code == "identity_changed" and "not the one that was typed" in error.message
    assert not roster_path(sites.path).exists()


def test_a_roster_without_this_site_cannot_be_verified(sites):
    identities = {**sites.identities(), "A": public_of(Ed25519PrivateKey.generate())}
    assert "for this site, A" in refusal_of(sites.verify, identities).message


def test_an_unknown_kind_of_trust_stops_everything(sites, monkeypatch):
    monkeypatch.setenv("nnUNet_fed_trust", "always")
    with pytest.raises(FederationError, match="nnUNet_fed_trust must be first_use or verified, not 'always'"):
        sites.trust(sites.keys())


def test_own_identity_is_that_of_the_credential(sites):
    assert sites.keys()["A"].identity == public_of(load_identity(sites.path))
