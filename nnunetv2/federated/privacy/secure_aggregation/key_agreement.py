"""Agree on keys: X25519 between two sites, then HKDF-SHA256 per purpose.

Everything that a key is for goes into its derivation, each part with its length in front, so that no two purposes can
have the same key. Envelopes are AES-256-GCM.
"""

from __future__ import annotations

import hashlib
import secrets

from nnunetv2.federated.errors import WireError

KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
ENVELOPE_OVERHEAD = _NONCE_BYTES + _TAG_BYTES
"""Bytes by which an envelope is larger than its content."""


def generate_private_key() -> bytes:
    """Return a new private key of X25519."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.generate().private_bytes_raw()


def public_key_of(private_key: bytes) -> bytes:
    """Return the public key of a private one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def agree(private_key: bytes, public_key: bytes) -> bytes:
    """Return the secret that two sites have in common, from which keys are derived.

    A site agrees with its own public key too: nobody else can compute that.

    Raises:
        WireError: The public key is none, or one with which everybody could compute the secret.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        return X25519PrivateKey.from_private_bytes(private_key).exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError as error:
        raise WireError("a run key is no public key of X25519") from error


def derive_key(secret: bytes, *purpose: bytes) -> bytes:
    """Return the key for a purpose, HKDF-SHA256 with all its parts as information."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, salt=None, info=with_lengths(*purpose)).derive(secret)


def with_lengths(*parts: bytes) -> bytes:
    """Join parts behind their lengths, so that other parts give other bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def digest_of(*parts: bytes) -> bytes:
    """Return the SHA-256 of parts with their lengths."""
    return hashlib.sha256(with_lengths(*parts)).digest()


def seal_envelope(key: bytes, content: bytes, *, outside: bytes = b"") -> bytes:
    """Encrypt content for the holder of a key.

    Args:
        outside: Associated data: authenticated with the content, not encrypted.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, outside)


def open_envelope(key: bytes, envelope: bytes, *, outside: bytes = b"") -> bytes:
    """Return the content of an envelope.

    Raises:
        WireError: It was not sealed with this key, or it or the associated data was changed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(envelope[:_NONCE_BYTES], envelope[_NONCE_BYTES:], outside)
    except (InvalidTag, ValueError) as error:
        raise WireError(
            "an envelope does not open: it was changed on its way, or is for another site or round"
        ) from error
