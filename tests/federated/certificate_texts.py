"""Texts that look like certificates, and what may come along with one."""

import base64


def block(content: bytes, kind: str = "CERTIFICATE") -> str:
    """Return what is a certificate as far as can be told without reading it: a DER sequence in a PEM block."""
    encoded = base64.b64encode(bytes([0x30, len(content)]) + content).decode()
    return f"-----BEGIN {kind}-----\n{encoded}\n-----END {kind}-----\n"


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
