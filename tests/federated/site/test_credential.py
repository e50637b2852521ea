"""Credentials on the disk of a site."""

import json
from dataclasses import replace

import pytest
from certificate_texts import BESIDE, block

from nnunetv2.federated.errors import NotJoinedError
from nnunetv2.federated.site.credential import SiteCredential, load_credential, save_credential

CREDENTIAL = SiteCredential("https://c.example:8750", "federation-1", "A", "A.token")


def test_a_credential_comes_back_and_is_private(tmp_path):
    path = save_credential(CREDENTIAL, tmp_path / "deep" / "site.json")
    assert load_credential(path) == CREDENTIAL
    assert path.stat().st_mode & 0o777 == 0o600
    assert "A.token" not in repr(CREDENTIAL)


def test_the_environment_says_where_the_credential_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(NotJoinedError, match="federated_site.json does not exist"):
        load_credential()
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "other.json"))
    save_credential(CREDENTIAL)
    assert (tmp_path / "other.json").exists()
    assert load_credential() == CREDENTIAL


@pytest.mark.parametrize("content", ["", "[]", '{"version": 99}', '{"version": 1, "url": "x"}'])
def test_a_broken_credential_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "site.json"
    path.write_text(content)
    with pytest.raises(NotJoinedError, match="site.json"):
        load_credential(path)


def test_the_file_is_versioned_json(tmp_path):
    content = json.loads(save_credential(CREDENTIAL, tmp_path / "site.json").read_text())
    assert content == {
        "version": 2,
        "url": "https://c.example:8750",
        "federation": "federation-1",
        "site": "A",
        "token": "A.token",
        "insecure": False,
    }


def test_a_credential_of_the_first_version_is_good(tmp_path):
    (tmp_path / "site.json").write_text(
        json.dumps(
            {
                "version": 1,
                "url": "https://c.example:8750",
                "federation": "federation-1",
                "site": "A",
                "token": "A.token",
                "insecure": False,
            }
        )
    )
    assert load_credential(tmp_path / "site.json") == CREDENTIAL


def test_a_credential_whose_authority_is_gone_trusts_nobody(tmp_path):
    authority = tmp_path / "site.json.ca.pem"
    authority.write_text(block(b"its authority"))
    path = save_credential(
        SiteCredential("https://h:1", "f", "A", "A.secret", authority=str(authority)), tmp_path / "site.json"
    )
    assert load_credential(path).authority == str(authority)
    authority.unlink()
    with pytest.raises(NotJoinedError, match=r"ca\.pem is missing.*join again"):
        load_credential(path)


@pytest.mark.parametrize("content", [*BESIDE.values(), "", "no certificate"], ids=[*BESIDE, "nothing", "text"])
def test_a_credential_that_trusts_more_than_one_authority_is_refused(content, tmp_path):
    """Earlier versions kept whatever had come with the pinned authority."""
    (tmp_path / "site.json.ca.pem").write_text(content)
    path = save_credential(
        SiteCredential("https://h:1", "f", "A", "A.secret", authority=str(tmp_path / "site.json.ca.pem")),
        tmp_path / "site.json",
    )
    with pytest.raises(NotJoinedError, match=r"site\.json\.ca\.pem does not hold .* alone.*join again.*--replace"):
        load_credential(path)


def test_a_credential_for_a_gateway_has_a_version_of_its_own(tmp_path):
    assert CREDENTIAL.coordinator == CREDENTIAL.url
    credential = replace(CREDENTIAL, url="http://127.0.0.1:4711", through="nvflare:network/liver")
    path = save_credential(credential, tmp_path / "site.json")
    assert json.loads(path.read_text())["version"] == 3
    assert load_credential(path) == credential and credential.coordinator == "nvflare:network/liver"
