"""People compare the number of a roster, and a site remembers that they have."""

import re

import pytest
from fake_federation import make_settings, served

from nnunetv2.federated.commands.roster import main
from nnunetv2.federated.errors import FederationError, RefusedError
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.identity import identity_path

NUMBER = r"(?:\d{5} ){7}\d{5}"


@pytest.fixture
def federation(tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_fed_trust", raising=False)
    with served(tmp_path / "federation", make_settings(sites=("A", "B", "C", "D"), secure={"k": 3})) as served_:
        for site in "ABC":
            served_.credential(site)
        yield served_


@pytest.fixture
def at(federation, monkeypatch, capsys):
    """Return a function that runs the command at a site and returns what it prints."""

    def run(site: str, *arguments: str) -> str:
        monkeypatch.setenv("nnUNet_fed_site", str(federation.credential_file(site)))
        assert main(arguments) == 0
        return capsys.readouterr().out

    return run


def number_in(text: str) -> str:
    return re.search(rf"Number of the roster:  ({NUMBER})\n", text)[1]


def test_all_sites_see_one_number_and_each_its_own(at):
    texts = {site: at(site) for site in "ABC"}
    assert len({number_in(text) for text in texts.values()}) == 1
    assert re.search(rf"^  A  {NUMBER}  not verified, this site$", texts["A"], flags=re.M)
    assert re.search(rf"^  B  {NUMBER}  not verified$", texts["A"], flags=re.M)
    assert "nnUNetv2_fed_roster --verified NUMBER" in texts["A"] and "nnUNet_fed_trust=first_use" in texts["A"]


def test_what_was_compared_stays_verified_until_a_site_is_new(at, federation):
    number = number_in(at("B"))
    assert "Verified: A, B, C" in at("A", "--verified", *number.split())
    assert "This roster was verified by people" in at("A")
    assert "not verified" in at("B")
    federation.credential("D")
    text = at("A")
    assert re.search(rf"^  D  {NUMBER}  not verified$", text, flags=re.M) and number_in(text) != number
    assert "Verified: A, B, C, D" in at("A", "--verified", number_in(at("B")).replace(" ", ""))


def test_a_site_that_joins_anew_is_shown_as_changed(at, federation):
    at("A", "--verified", number_in(at("B")))
    identity_path(federation.credential_file("C")).unlink()
    federation.coordinator.invite("C", "site", by="boss")
    join(federation.invitation("C"), path=federation.credential_file("C"))
    text = at("A")
    assert re.search(rf"^  C  {NUMBER}  CHANGED since it was first seen$", text, flags=re.M)
    assert "Ask C by telephone whether it has joined anew" in text
    at("A", "--verified", number_in(at("C")))
    assert "CHANGED" not in at("A")


def test_a_site_that_has_gone_is_named(at, federation):
    at("A", "--verified", number_in(at("B")))
    federation.coordinator.revoke("C", by="boss")
    assert "Seen before, not among them now: C" in at("A")


def test_another_number_is_refused(at):
    with pytest.raises(RefusedError, match="not the one that was typed.*Compare digit by digit"):
        at("A", "--verified", "12345 " * 8)


def test_a_federation_in_clear_has_no_roster(tmp_path, monkeypatch):
    with served(tmp_path / "clear", make_settings()) as federation:
        federation.credential("A")
        monkeypatch.setenv("nnUNet_fed_site", str(federation.credential_file("A")))
        with pytest.raises(FederationError, match="does not aggregate securely: its sites have no identities"):
            main([])
