"""Invitations and credentials."""

import base64
import json
import os
from pathlib import Path

import pytest
from fake_federation import make_settings, served

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NotJoinedError, RefusedError, WireError
from nnunetv2.federated.site import credential as site_module
from nnunetv2.federated.site.credential import (
    Invitation,
    SiteCredential,
    check_transport_is_safe,
    check_url,
    decode_invitation,
    encode_invitation,
    join,
    load_credential,
    main,
    save_credential,
)

INVITATION = Invitation("http://127.0.0.1:8750", "federation-1", "clinic-a", "secret-of-32-bytes")
CREDENTIAL = SiteCredential("https://c.example:8750", "federation-1", "A", "A.token")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    settings = make_settings(sites=("A", "B", "C", "D", "E"))
    with served(tmp_path_factory.mktemp("site") / "federation", settings) as served_:
        yield served_


def invitation_for(federation, invited: str, **changes) -> Invitation:
    secret = federation.invitations()[invited]
    return Invitation(**{"url": federation.url, "federation": "test", "site": invited, "secret": secret, **changes})


def block(content: bytes, kind: str = "CERTIFICATE") -> str:
    """Return what is a certificate as far as can be told without reading it: a DER sequence in a PEM block."""
    encoded = base64.b64encode(bytes([0x30, len(content)]) + content).decode()
    return f"-----BEGIN {kind}-----\n{encoded}\n-----END {kind}-----\n"


def test_an_invitation_survives_a_mail():
    word = encode_invitation(INVITATION)
    assert word.startswith("nnunet-fed:") and " " not in word and "=" not in word
    assert decode_invitation(f"  {word}\n") == INVITATION


@pytest.mark.parametrize(
    "damage",
    [
        lambda word: word[:-9],
        lambda word: word[11:],
        lambda word: word.replace("nnunet-fed", "nnunet"),
        lambda word: word + "*",
        lambda word: "nnunet-fed:",
        lambda word: "nnunet-fed:W10",
        lambda word: encode_invitation(Invitation("ftp://x", "f", "a", "s")),
        lambda word: encode_invitation(Invitation("http://x", "f", "../a", "s")),
    ],
)
def test_a_damaged_invitation_is_refused(damage):
    with pytest.raises(WireError):
        decode_invitation(damage(encode_invitation(INVITATION)))


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


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8750", "ftp://host", "http://", "http://host:x", "http://a@host", "https://host/?q=1"]
)
def test_other_addresses_are_refused(url):
    with pytest.raises(WireError):
        check_url(url)


@pytest.mark.parametrize(
    ("url", "insecure", "is_safe"),
    [
        ("http://127.0.0.1:1", False, True),
        ("http://localhost:1", False, True),
        ("http://[::1]:1", False, True),
        ("https://hospital.example", False, True),
        ("http://hospital.example", False, False),
        ("http://10.0.0.1", False, False),
        ("http://127.0.0.1.evil.example", False, False),
        ("http://hospital.example", True, True),
    ],
)
def test_plain_http_stays_on_this_machine_unless_allowed(url, insecure, is_safe):
    if is_safe:
        check_transport_is_safe(url, insecure=insecure)
    else:
        with pytest.raises(FederationError, match="plain HTTP"):
            check_transport_is_safe(url, insecure=insecure)


def test_joining_takes_one_line(federation, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_fed_site", str(tmp_path / "site.json"))
    assert main([encode_invitation(invitation_for(federation, "A"))]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "Site A has joined test" in line and "B, C, D, E" in line
    credential = load_credential()
    assert (credential.url, credential.site) == (federation.url, "A")
    assert credential.token.startswith("A.") and len(credential.token) > 40
    assert not (tmp_path / "site.json.joining").exists()
    assert "site A has joined" in federation.lines


def test_joining_again_with_the_same_token_is_fine(federation, tmp_path):
    invitation = invitation_for(federation, "B")
    join(invitation, path=tmp_path / "site.json")
    before = load_credential(tmp_path / "site.json")
    join(invitation, path=tmp_path / "site.json")
    assert load_credential(tmp_path / "site.json") == before


def test_an_invitation_is_good_for_one_site_only(federation, tmp_path):
    invitation = invitation_for(federation, "C")
    join(invitation, path=tmp_path / "first.json")
    with pytest.raises(RefusedError, match="has been used already") as info:
        join(invitation, path=tmp_path / "second.json")
    assert info.value.code == "invitation_used"
    assert list(tmp_path.iterdir()) == [tmp_path / "first.json"]


@pytest.mark.parametrize("changes", [{"secret": "guessed"}, {"site": "E"}, {"site": "nobody"}])
def test_an_invitation_that_was_never_made_is_refused(federation, tmp_path, changes):
    with pytest.raises(RefusedError, match="not known here"):
        join(invitation_for(federation, "D", **changes), path=tmp_path / "site.json")


def test_an_interrupted_join_goes_on_with_the_token_that_was_sent(federation, tmp_path, monkeypatch):
    from nnunetv2.federated.site.transports import http

    path, invitation = tmp_path / "site.json", invitation_for(federation, "D")

    def answer_gets_lost(credential, secret):
        request_to_join(credential, secret)
        raise CoordinatorUnreachable("the connection broke")

    request_to_join = http.request_to_join
    monkeypatch.setattr(http, "request_to_join", answer_gets_lost)
    with pytest.raises(CoordinatorUnreachable):
        join(invitation, path=path)
    assert not path.exists()
    monkeypatch.undo()
    join(invitation, path=path)
    federation.coordinator.members.authenticate(load_credential(path).token)


def test_the_credential_of_another_federation_is_not_overwritten(federation, tmp_path):
    path = save_credential(CREDENTIAL, tmp_path / "site.json")
    invitation = invitation_for(federation, "E")
    with pytest.raises(FederationError, match="holds the credential of site A of federation-1; add --replace"):
        join(invitation, path=path)
    assert load_credential(path) == CREDENTIAL
    join(invitation, path=path, replace=True)
    assert load_credential(path).site == "E"


def test_a_refused_join_leaves_the_authority_of_the_credential_that_it_would_replace(federation, tmp_path, monkeypatch):
    from nnunetv2.federated.protocol import certificates

    monkeypatch.chdir(tmp_path)
    old, new = block(b"old"), block(b"new")
    fingerprint = certificates.fingerprint_of(new)
    monkeypatch.setattr(certificates, "fetch_authority", lambda url, **others: new)
    (tmp_path / "site.json.ca.pem").write_text(old)
    path = Path("site.json")
    before = SiteCredential("https://h:1", "f", "A", "A.secret", authority=str(tmp_path / "site.json.ca.pem"))
    save_credential(before, path)
    invitation = Invitation(federation.url, "test", "E", "guessed", authority=fingerprint)
    with pytest.raises(RefusedError, match="not known here"):
        join(invitation, path=path, replace=True)
    assert load_credential(path) == before and Path(before.authority).read_text() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site.json", "site.json.ca.pem"]

    from nnunetv2.federated.protocol import api
    from nnunetv2.federated.site.transports import http

    answer = api.JoinAnswer(federation="test", site="E", role="site", settings=make_settings())
    monkeypatch.setattr(http, "request_to_join", lambda credential, secret: answer)
    join(invitation, path=path, replace=True)
    monkeypatch.chdir("/")
    after = load_credential(tmp_path / path)
    assert after.site == "E" and Path(after.authority).read_text() == new
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site.json", "site.json.ca.pem"]


def test_help_answers_at_once_without_torch():
    import subprocess
    import sys

    code = (
        f"import sys; from {site_module.__name__} import main\n"
        "try:\n    main(['-h'])\nfinally:\n"
        "    late = {'torch', 'requests', 'pydantic', 'numpy', 'SimpleITK', 'scipy'} & set(sys.modules)\n"
        "    assert not late, late"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0 and "nnunet-fed:" in done.stdout, done.stderr


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


# ------------------------------------------------------------------------------------------------ pinned authority
GENUINE = block(b"genuine")
BESIDE = {
    "an authority behind it": GENUINE + block(b"of the attacker"),
    "an authority before it": block(b"of the attacker") + GENUINE,
    "a trusted certificate": GENUINE + block(b"of the attacker", "TRUSTED CERTIFICATE"),
    "another kind of certificate": GENUINE + block(b"of the attacker", "X509 CERTIFICATE"),
    "a key": GENUINE + block(b"key", "PRIVATE KEY"),
    "text before it": f"subject=/CN=authority\n{GENUINE}",
    "text behind it": f"{GENUINE}issuer=/CN=authority\n",
    "half a block": GENUINE + block(b"of the attacker")[:40],
}


@pytest.mark.parametrize(
    "answer",
    [*BESIDE.values(), block(b"of the attacker"), "", "<html>"],
    ids=[*BESIDE, "another authority", "nothing", "a page"],
)
def test_nothing_but_the_pinned_authority_is_believed(answer, tmp_path, monkeypatch):
    from nnunetv2.federated.protocol import certificates
    from nnunetv2.federated.site.transports import http

    monkeypatch.setattr(certificates, "fetch_authority", lambda url, **others: answer)
    monkeypatch.setattr(http, "request_to_join", lambda *_: pytest.fail("the secret was sent"))
    invitation = Invitation("https://c.example:8750", "test", "A", "s", certificates.fingerprint_of(GENUINE))
    with pytest.raises(FederationError, match=r"is not the coordinator of the invitation.*Somebody may be in between"):
        join(invitation, path=tmp_path / "site.json")
    assert not list(tmp_path.iterdir())


def test_the_pinned_authority_is_written_anew(tmp_path, monkeypatch):
    from nnunetv2.federated.protocol import api, certificates
    from nnunetv2.federated.site.transports import http

    told = "\r\n" + GENUINE.replace("\n", "\r\n") + "  \n"
    monkeypatch.setattr(certificates, "fetch_authority", lambda url, **others: told)
    answer = api.JoinAnswer(federation="test", site="A", role="site", settings=make_settings())
    monkeypatch.setattr(http, "request_to_join", lambda credential, secret: answer)
    join(
        Invitation("https://c.example:8750", "test", "A", "s", certificates.fingerprint_of(GENUINE)),
        path=tmp_path / "site.json",
    )
    assert (tmp_path / "site.json.ca.pem").read_text() == GENUINE


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


def test_a_client_certificate_that_cannot_be_shown_is_refused_before_anything_is_sent(tmp_path):
    (tmp_path / "a.pem").write_text(block(b"no certificate"))
    invitation = Invitation("https://c.example:8750", "test", "A", "secret")
    for certificate, key in (("missing.pem", None), ("a.pem", None), ("a.pem", "missing.key")):
        with pytest.raises(FederationError, match=rf"{certificate}.* cannot be used for TLS"):
            join(
                invitation,
                path=tmp_path / "site.json",
                client_certificate=tmp_path / certificate,
                client_key=None if key is None else tmp_path / key,
            )
