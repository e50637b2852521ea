"""Invitations, and the addresses in them."""

import base64
import json
from dataclasses import replace

import pytest

from nnunetv2.federated.errors import FederationError, WireError
from nnunetv2.federated.protocol.invitation import (
    Invitation,
    check_transport_is_safe,
    check_url,
    decode_invitation,
    encode_invitation,
)

INVITATION = Invitation("http://127.0.0.1:8750", "federation-1", "clinic-a", "secret-of-32-bytes")


def test_an_invitation_survives_a_mail():
    word = encode_invitation(INVITATION)
    assert word.startswith("nnunet-fed:") and " " not in word and "=" not in word
    assert decode_invitation(f"  {word}\n") == INVITATION


def test_an_invitation_in_clear_has_the_bytes_that_it_always_had():
    word = encode_invitation(INVITATION).removeprefix("nnunet-fed:")
    assert base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)) == (
        b'{"v":2,"url":"http://127.0.0.1:8750","federation":"federation-1","site":"clinic-a",'
        b'"secret":"secret-of-32-bytes","authority":null}'
    )


def test_a_secure_invitation_is_of_a_version_that_older_sites_refuse():
    secure = replace(INVITATION, secure=True)
    word = encode_invitation(secure)
    assert decode_invitation(word) == secure
    assert content_of(word)["v"] == 3


def content_of(word: str) -> dict:
    word = word.removeprefix("nnunet-fed:")
    return json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": 4}, "is of version 4.*up to 3: use matching versions"),
        ({"v": 2}, "incomplete"),
        ({"secure": False}, "incomplete"),
        ({"secure": 1}, "incomplete"),
        ({"secure": "true"}, "incomplete"),
    ],
)
def test_a_secure_invitation_says_so_in_one_way_only(change, message):
    content = {**content_of(encode_invitation(replace(INVITATION, secure=True))), **change}
    word = "nnunet-fed:" + base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
    with pytest.raises(WireError, match=message):
        decode_invitation(word)


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
