"""Identities sign run keys and survivors, and a roster has a number."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from nnunetv2.federated.errors import RefusedError
from nnunetv2.federated.privacy.identities import (
    check_confirmations,
    check_run_keys,
    is_number,
    is_signed,
    length_prefixed,
    public_of,
    roster_number,
    sign,
    sign_run_key,
    sign_survivors,
)

SITES = ("A", "B", "C", "D", "E")
IDENTITIES = {site: Ed25519PrivateKey.generate() for site in SITES}
PUBLIC = {site: public_of(identity) for site, identity in IDENTITIES.items()}
PLACE = {"federation": "federation-1", "gathering": "runs/r/registration"}


def make_keys(**others):
    return {
        site: sign_run_key(identity, X25519PrivateKey.generate(), **{**PLACE, **others})
        for site, identity in IDENTITIES.items()
    }


# -------------------------------------------------------------------------------------------------------- signatures
@given(st.lists(st.text(max_size=8), max_size=4), st.lists(st.text(max_size=8), max_size=4))
def test_only_equal_parts_have_equal_bytes(first, second):
    assert (length_prefixed(*first) == length_prefixed(*second)) == (first == second)


def test_parts_are_bytes_behind_their_length():
    assert length_prefixed("ab", b"c", 12) == bytes(7) + b"\x02ab" + bytes(7) + b"\x01c" + bytes(7) + b"\x0212"


def test_a_signature_holds_for_its_purpose_its_parts_and_its_identity():
    signature = sign(IDENTITIES["A"], "run key", "f", "g")
    assert is_signed(signature, PUBLIC["A"], "run key", "f", "g")
    assert not is_signed(signature, PUBLIC["A"], "survivors", "f", "g")
    assert not is_signed(signature, PUBLIC["A"], "run key", "fg")
    assert not is_signed(signature, PUBLIC["A"], "run key", "g", "f")
    assert not is_signed(signature, PUBLIC["B"], "run key", "f", "g")


@pytest.mark.parametrize("signature", ["", "00" * 64, "zz" * 64, "0" * 127])
def test_what_is_no_signature_is_none(signature):
    assert not is_signed(signature, PUBLIC["A"], "run key")


@pytest.mark.parametrize("identity", ["00" * 32, "ff" * 32, "", "zz"])
def test_what_is_no_identity_has_signed_nothing(identity):
    assert not is_signed(sign(IDENTITIES["A"], "run key"), identity, "run key")


# ---------------------------------------------------------------------------------------------------------- run keys
def test_run_keys_of_a_cohort_are_accepted():
    check_run_keys(make_keys(), **PLACE)
    mixed = {**make_keys(), **{site: make_keys(gathering="runs/r/keys/1")[site] for site in "DE"}}
    places = {site: "runs/r/keys/1" if site in "DE" else PLACE["gathering"] for site in SITES}
    check_run_keys(mixed, federation="federation-1", gathering=places)


@pytest.mark.parametrize(
    "forge",
    [
        lambda keys: keys["B"].model_copy(update={"exchange_key": public_of(X25519PrivateKey.generate())}),
        lambda keys: keys["B"].model_copy(update={"signature": "0" * 128}),
        lambda keys: keys["B"].model_copy(update={"identity": PUBLIC["C"]}),
        lambda keys: keys["C"].model_copy(update={"identity": PUBLIC["B"]}),
        lambda keys: make_keys(gathering="runs/other/registration")["B"],
        lambda keys: make_keys(gathering="runs/r/keys/1")["B"],
        lambda keys: make_keys(federation="federation-2")["B"],
    ],
    ids=["swapped", "unsigned", "of another", "signed by another", "of another run", "of later", "of elsewhere"],
)
def test_a_forged_run_key_is_refused_by_the_name_of_its_site(forge):
    keys = make_keys()
    with pytest.raises(RefusedError, match="hands out for site B is not signed by that site") as info:
        check_run_keys({**keys, "B": forge(keys)}, **PLACE)
    assert info.value.code == "run_key_forged"


def test_one_site_under_two_names_is_refused():
    keys = make_keys()
    twin = sign_run_key(IDENTITIES["A"], X25519PrivateKey.generate(), **PLACE)
    with pytest.raises(RefusedError, match="sites A and Z have one identity") as info:
        check_run_keys({**keys, "Z": twin}, **PLACE)
    assert info.value.code == "identity_repeated"


def test_one_key_under_two_identities_is_refused():
    keys, shared = make_keys(), X25519PrivateKey.generate()
    keys |= {site: sign_run_key(IDENTITIES[site], shared, **PLACE) for site in "BD"}
    with pytest.raises(RefusedError, match="sites B and D have one run key"):
        check_run_keys(keys, **PLACE)


# --------------------------------------------------------------------------------------------------------- survivors
ROUND = {"federation": "federation-1", "gathering": "runs/r/survivors/3", "digest": "ab" * 32}


def confirmations(sites=SITES, **others):
    return {site: sign_survivors(IDENTITIES[site], **{**ROUND, **others}) for site in sites}


def test_enough_confirmations_of_one_set_are_accepted():
    check_confirmations(confirmations("ABCD"), PUBLIC, least=4, **ROUND)


@pytest.mark.parametrize(
    "others",
    [{"digest": "cd" * 32}, {"gathering": "runs/r/survivors/2"}, {"federation": "federation-2"}],
    ids=["of another set", "replayed from another round", "of another federation"],
)
def test_confirmations_of_something_else_do_not_count(others):
    signatures = confirmations("BC", **others) | confirmations("AD")
    with pytest.raises(RefusedError, match=r"2 of the 4 sites .* \(A, D\)") as info:
        check_confirmations(signatures, PUBLIC, least=4, **ROUND)
    assert info.value.code == "survivors_unconfirmed"


def test_a_site_that_the_cohort_does_not_know_confirms_nothing():
    signatures = confirmations("ABC") | {"Z": sign_survivors(IDENTITIES["E"], **ROUND)}
    with pytest.raises(RefusedError, match="3 of the 4"):
        check_confirmations(signatures, PUBLIC, least=4, **ROUND)


def test_one_signature_under_two_names_counts_once():
    signatures = confirmations("AB")
    signatures |= {"C": signatures["A"], "D": signatures["A"]}
    with pytest.raises(RefusedError, match="2 of the 4"):
        check_confirmations(signatures, PUBLIC, least=4, **ROUND)


# ----------------------------------------------------------------------------------------------------------- numbers
def test_a_number_has_eight_groups_of_five_digits():
    groups = roster_number("f", PUBLIC).split(" ")
    assert len(groups) == 8 and all(len(group) == 5 and group.isdecimal() for group in groups)


def test_a_number_is_always_the_same():
    assert roster_number("f", {"A": "00" * 32}) == "15427 30992 15631 56696 72624 75140 75954 06432"


def test_a_number_tells_every_roster_from_every_other():
    rosters = [
        ("f", {"A": PUBLIC["A"], "B": PUBLIC["B"]}),
        ("g", {"A": PUBLIC["A"], "B": PUBLIC["B"]}),
        ("f", {"A": PUBLIC["B"], "B": PUBLIC["A"]}),
        ("f", {"A": PUBLIC["A"]}),
        ("f", {"A": PUBLIC["A"], "B": PUBLIC["C"]}),
        ("f", {"a": PUBLIC["A"], "B": PUBLIC["B"]}),
    ]
    assert len({roster_number(*roster) for roster in rosters}) == len(rosters)
    assert roster_number("f", dict(sorted(PUBLIC.items()))) == roster_number("f", dict(reversed(PUBLIC.items())))


def test_a_number_may_be_typed_in_any_groups():
    number = roster_number("f", PUBLIC)
    assert is_number(number, number) and is_number(number.replace(" ", ""), number)
    assert is_number(f" {number.replace(' ', '-')} ", number)
    assert not is_number(number[:-1], number) and not is_number("", number)
