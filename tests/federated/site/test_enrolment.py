"""Join a federation with an invitation."""

from pathlib import Path

import pytest
from certificate_texts import BESIDE, GENUINE, block
from fake_federation import make_settings, served

from nnunetv2.federated.errors import CoordinatorUnreachable, FederationError, NotAllowedError, RefusedError
from nnunetv2.federated.privacy.identities import public_of
from nnunetv2.federated.protocol import api
from nnunetv2.federated.protocol.certificates import fingerprint_of
from nnunetv2.federated.protocol.invitation import Invitation
from nnunetv2.federated.site import enrolment
from nnunetv2.federated.site.credential import SiteCredential, load_credential, save_credential
from nnunetv2.federated.site.enrolment import join
from nnunetv2.federated.site.identity import load_identity

CREDENTIAL = SiteCredential("https://c.example:8750", "federation-1", "A", "A.token")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    settings = make_settings(sites=("A", "B", "C", "D", "E"))
    with served(tmp_path_factory.mktemp("site") / "federation", settings) as served_:
        yield served_


def invitation_for(federation, invited: str, **changes) -> Invitation:
    secret = federation.invitations()[invited]
    return Invitation(**{"url": federation.url, "federation": "test", "site": invited, "secret": secret, **changes})


def test_joining_again_with_the_same_token_is_fine(federation, tmp_path):
    invitation = invitation_for(federation, "B")
    join(invitation, path=tmp_path / "site.json")
    before = load_credential(tmp_path / "site.json")
    join(invitation, path=tmp_path / "site.json")
    assert load_credential(tmp_path / "site.json") == before


def test_who_joins_a_federation_of_networks_that_differ_is_told_to_plan_for_its_own_gpu(tmp_path):
    with served(tmp_path / "federation", make_settings(networks="own")) as own:
        told = join(invitation_for(own, "A"), path=tmp_path / "site.json")
    assert "Each site has a network of its own" in told and "-gpu_memory_target" in told
    assert load_credential(tmp_path / "site.json").networks == "own"


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
    path, invitation = tmp_path / "site.json", invitation_for(federation, "D")

    def answer_gets_lost(*request):
        request_to_join(*request)
        raise CoordinatorUnreachable("the connection broke")

    request_to_join = enrolment.request_to_join
    monkeypatch.setattr(enrolment, "request_to_join", answer_gets_lost)
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
    monkeypatch.chdir(tmp_path)
    old, new = block(b"old"), block(b"new")
    fingerprint = fingerprint_of(new)
    monkeypatch.setattr(enrolment, "fetch_authority", lambda url, **others: new)
    (tmp_path / "site.json.ca.pem").write_text(old)
    path = Path("site.json")
    before = SiteCredential("https://h:1", "f", "A", "A.secret", authority=str(tmp_path / "site.json.ca.pem"))
    save_credential(before, path)
    invitation = Invitation(federation.url, "test", "E", "guessed", authority=fingerprint)
    with pytest.raises(RefusedError, match="not known here"):
        join(invitation, path=path, replace=True)
    assert load_credential(path) == before and Path(before.authority).read_text() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site.json", "site.json.ca.pem"]

    answer = api.JoinAnswer(federation="test", site="E", role="site", settings=make_settings())
    monkeypatch.setattr(enrolment, "request_to_join", lambda *_: answer)
    join(invitation, path=path, replace=True)
    monkeypatch.chdir("/")
    after = load_credential(tmp_path / path)
    assert after.site == "E" and Path(after.authority).read_text() == new
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site.json", "site.json.ca.pem"]


@pytest.mark.parametrize(
    "answer",
    [*BESIDE.values(), block(b"of the attacker"), "", "<html>"],
    ids=[*BESIDE, "another authority", "nothing", "a page"],
)
def test_nothing_but_the_pinned_authority_is_believed(answer, tmp_path, monkeypatch):
    monkeypatch.setattr(enrolment, "fetch_authority", lambda url, **others: answer)
    monkeypatch.setattr(enrolment, "request_to_join", lambda *_: pytest.fail("the secret was sent"))
    invitation = Invitation("https://c.example:8750", "test", "A", "s", fingerprint_of(GENUINE))
    with pytest.raises(FederationError, match=r"is not the coordinator of the invitation.*Somebody may be in between"):
        join(invitation, path=tmp_path / "site.json")
    assert not list(tmp_path.iterdir())


def test_the_pinned_authority_is_written_anew(tmp_path, monkeypatch):
    told = "\r\n" + GENUINE.replace("\n", "\r\n") + "  \n"
    monkeypatch.setattr(enrolment, "fetch_authority", lambda url, **others: told)
    answer = api.JoinAnswer(federation="test", site="A", role="site", settings=make_settings())
    monkeypatch.setattr(enrolment, "request_to_join", lambda *_: answer)
    join(Invitation("https://c.example:8750", "test", "A", "s", fingerprint_of(GENUINE)), path=tmp_path / "site.json")
    assert (tmp_path / "site.json.ca.pem").read_text() == GENUINE


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


# ---------------------------------------------------------------------------------------------------------- protection
@pytest.fixture(scope="module")
def secure_federation(tmp_path_factory):
    settings = make_settings(sites=("A", "B", "C", "D", "E", "F"), secure={"k": 4})
    with served(tmp_path_factory.mktemp("secure") / "federation", settings) as served_:
        yield served_


@pytest.fixture
def required(monkeypatch):
    """Return a function that sets from how many sites on this site lets itself be summed."""
    return lambda k: monkeypatch.setenv("nnUNet_fed_require_secure", str(k))


def invited_anew(federation, name: str, role: str = "site") -> Invitation:
    return Invitation(federation.url, "test", name, federation.coordinator.invite(name, role, by="boss"))


def test_a_site_that_requires_secure_sums_does_not_join_a_federation_in_clear(federation, tmp_path, required):
    required(3)
    path, invitation = tmp_path / "site.json", invited_anew(federation, "F")
    with pytest.raises(NotAllowedError, match=r"in clear, and this site requires .* \(nnUNet_fed_require_secure=3"):
        join(invitation, path=path)
    assert not path.exists()


def test_who_only_looks_on_requires_nothing(federation, tmp_path, required):
    required(3)
    said = join(invited_anew(federation, "eve", "observer"), path=tmp_path / "eve.json")
    assert said.startswith("Observer eve has joined")


def test_a_site_that_requires_larger_sums_has_not_joined_but_may_later(secure_federation, tmp_path, required):
    path, invitation = tmp_path / "site.json", secure_federation.invitation("A")
    required(5)
    with pytest.raises(NotAllowedError, match="sums from 4 sites on, and this site requires secure sums of 5"):
        join(invitation, path=path)
    assert not path.exists()
    required(4)
    join(invitation, path=path)
    assert load_credential(path).secure == 4


def test_a_coordinator_that_forgets_what_its_invitation_promised_is_refused(tmp_path, monkeypatch):
    answer = api.JoinAnswer(federation="test", site="A", role="site", settings=make_settings())
    monkeypatch.setattr(enrolment, "request_to_join", lambda *_: answer)
    with pytest.raises(NotAllowedError, match="although the invitation says so: this site has not joined"):
        join(Invitation("https://c.example:8750", "test", "A", "s", secure=True), path=tmp_path / "site.json")
    assert not (tmp_path / "site.json").exists()


def test_an_interrupted_secure_join_goes_on_with_the_identity_that_was_sent(secure_federation, tmp_path, monkeypatch):
    path, invitation = tmp_path / "site.json", secure_federation.invitation("B")
    request_to_join = enrolment.request_to_join

    def answer_gets_lost(*request):
        request_to_join(*request)
        raise CoordinatorUnreachable("the connection broke")

    monkeypatch.setattr(enrolment, "request_to_join", answer_gets_lost)
    with pytest.raises(CoordinatorUnreachable):
        join(invitation, path=path)
    monkeypatch.undo()
    join(invitation, path=path)
    assert secure_federation.coordinator.roster().sites["B"] == public_of(load_identity(path))


def test_without_the_library_a_site_cannot_join_and_says_what_to_install(secure_federation, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunetv2.federated.privacy.cryptography_library.find_spec", lambda name: None)
    invitation = secure_federation.invitation("C")
    with pytest.raises(FederationError, match="pip install cryptography"):
        join(invitation, path=tmp_path / "site.json")
    monkeypatch.undo()
    join(invitation, path=tmp_path / "site.json")


def test_a_join_in_clear_makes_no_identity(federation, tmp_path):
    join(invited_anew(federation, "G"), path=tmp_path / "site.json")
    assert [file.name for file in tmp_path.iterdir()] == ["site.json"]
