"""Invitations, and the addresses in them."""

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
