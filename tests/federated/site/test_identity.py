"""A site keeps its identity, and one key per gathering until that is over."""

import multiprocessing
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from fake_federation import in_threads
from patience import PATIENCE_S

from nnunetv2.federated.errors import FederationError, NotJoinedError
from nnunetv2.federated.privacy.identities import check_run_keys, public_of
from nnunetv2.federated.site.identity import (
    forget_run_keys,
    identity_path,
    load_identity,
    make_identity,
    run_key,
    secure_folder,
)

GATHERING = "runs/3d_fullres.fold_0.nnUNetTrainerFake/registration"


@pytest.fixture
def site(tmp_path) -> Path:
    """Return the credential's path of a site that has an identity."""
    path = tmp_path / "site.json"
    make_identity(path)
    return path


def exchange_keys(site: Path) -> list[Path]:
    return sorted(site.with_name("site.json.secure").rglob("*.pem"))


def test_an_identity_is_made_once_and_only_its_owner_can_read_it(site):
    first = public_of(load_identity(site))
    assert public_of(make_identity(site)) == first
    assert stat.S_IMODE(identity_path(site).stat().st_mode) == 0o600
    assert not list(site.parent.glob(".partial-*"))


def test_sites_that_begin_together_have_one_identity(tmp_path):
    path = tmp_path / "site.json"
    made = in_threads(*[lambda: public_of(make_identity(path))] * 8)
    assert set(made) == {public_of(load_identity(path))}


def test_a_missing_identity_is_named_with_the_remedy(tmp_path):
    with pytest.raises(NotJoinedError, match=r"site\.json\.identity\.pem does not exist.*tell the other sites"):
        load_identity(tmp_path / "site.json")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\n", None], ids=["empty", "cut off", "X25519"])
def test_a_damaged_identity_is_never_replaced_in_silence(site, content):
    if content is None:
        run_key("f", GATHERING, site)
        (key,) = exchange_keys(site)
        content = key.read_bytes()
    identity_path(site).write_bytes(content)
    for function in (load_identity, make_identity):
        with pytest.raises(NotJoinedError, match="cannot be read.*another identity"):
            function(site)
    assert identity_path(site).read_bytes() == content


# ------------------------------------------------------------------------------------------------------ exchange keys
def test_a_run_key_stays_the_same_until_it_is_forgotten(site):
    key, signed = run_key("f", GATHERING, site)
    again, signed_again = run_key("f", GATHERING, site)
    assert again.private_bytes_raw() == key.private_bytes_raw() and signed_again == signed
    assert signed.identity == public_of(load_identity(site)) and signed.exchange_key == public_of(key)
    check_run_keys({"A": signed}, federation="f", gathering=GATHERING)
    (path,) = exchange_keys(site)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    forget_run_keys("f", GATHERING.rpartition("/")[0], site)
    assert not exchange_keys(site)
    assert run_key("f", GATHERING, site)[1].exchange_key != signed.exchange_key


def test_no_two_gatherings_or_federations_have_one_key(site):
    places = [
        ("f", GATHERING),
        ("g", GATHERING),
        ("../f", GATHERING),
        ("f", "runs/3d_fullres.fold_1.nnUNetTrainerFake/registration"),
        ("f", "runs/3d_fullres.fold_0.nnUNetTrainerFake/keys/1"),
        ("f", "fingerprint/census"),
    ]
    keys = {run_key(*place, site)[1].exchange_key for place in places}
    assert len(keys) == len(places) == len(exchange_keys(site))


def test_forgetting_a_run_leaves_other_runs_and_other_files(site):
    run_key("f", GATHERING, site)
    run_key("f", "runs/other/registration", site)
    run_key("f", "runs/other/keys/1", site)
    outbox = secure_folder("f", "runs/other", site) / "outbox"
    outbox.write_bytes(b"x")
    forget_run_keys("f", "runs/other", site)
    forget_run_keys("f", "runs/other", site)
    forget_run_keys("f", "runs/never", site)
    assert [path.parent.name for path in exchange_keys(site)] == ["registration"]
    assert outbox.exists()


def test_a_run_key_needs_an_identity(tmp_path):
    with pytest.raises(NotJoinedError, match="has no identity"):
        run_key("f", GATHERING, tmp_path / "site.json")
    assert not (tmp_path / "site.json.secure").exists()


def test_a_damaged_run_key_is_never_replaced_in_silence(site):
    run_key("f", GATHERING, site)
    (path,) = exchange_keys(site)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FederationError, match=r"exchange_key\.pem of runs/.* cannot be read"):
        run_key("f", GATHERING, site)


@pytest.mark.parametrize("gathering", ["../../x", "runs//registration", "runs/.hidden/registration", "/etc", ""])
def test_a_gathering_cannot_lead_out_of_the_folder(site, gathering):
    with pytest.raises(ValueError, match="cannot be part of a key"):
        run_key("f", gathering, site)


def take_key(path: Path, answers) -> None:
    answers.put(run_key("f", GATHERING, path)[1].exchange_key)


@pytest.mark.slow
def test_two_processes_that_begin_together_have_one_key(site):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=take_key, args=(site, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    keys = {answers.get(timeout=PATIENCE_S) for _ in processes}
    for process in processes:
        process.join(PATIENCE_S)
    assert len(keys) == 1


def test_what_is_stored_is_an_x25519_key_in_pem(site):
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    run_key("f", GATHERING, site)
    (path,) = exchange_keys(site)
    assert isinstance(load_pem_private_key(path.read_bytes(), None), X25519PrivateKey)
