"""Add keystreams of AES-256-CTR to vectors of unsigned words, and subtract them, modulo 2^16, 2^32 or 2^64.

A seed of 32 bytes is the key of one stream; its counter begins at 0, since no seed is used for two streams. A stream can
be entered at any word, so that a long vector may be worked on tensor by tensor, in any order, by several threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

SEED_BYTES = 32
_CIPHER_BLOCK = 16
_BLOCK_BYTES = 1 << 17
"""Bytes masked at a time: they, and as many of the stream, stay in the processor's cache."""
_ZEROS = bytes(_BLOCK_BYTES)


class Keystream:
    """The words of one stream, in order.

    Args:
        seed: 32 bytes.
        dtype: Little-endian unsigned words.
        begin: The first word wanted.
    """

    def __init__(self, seed: bytes, dtype: np.dtype, begin: int = 0) -> None:
        self._dtype = dtype
        self._buffer = bytearray(_BLOCK_BYTES + _CIPHER_BLOCK - 1)
        counter, skipped = divmod(begin * dtype.itemsize, _CIPHER_BLOCK)
        self._cipher = _encryptor(seed, counter)
        self._cipher.update_into(_ZEROS[:skipped], self._buffer)

    def words(self, count: int) -> np.ndarray:
        """Return the next words, of at most a block; they are valid until the next are asked for."""
        size = count * self._dtype.itemsize
        self._cipher.update_into(_ZEROS if size == _BLOCK_BYTES else memoryview(_ZEROS)[:size], self._buffer)
        return np.frombuffer(self._buffer, self._dtype, count)


def words_per_block(dtype: np.dtype) -> int:
    """Return how many words are masked at a time."""
    return _BLOCK_BYTES // dtype.itemsize


def apply_masks_(words: np.ndarray, *, plus: Iterable[bytes], minus: Iterable[bytes], begin: int = 0) -> None:
    """Add and subtract the streams of seeds, in place and block by block.

    Args:
        words: Contiguous vector of little-endian unsigned words.
        plus: Seeds of the streams to add.
        minus: Seeds of those to subtract.
        begin: Place of the first of these words in the whole vector, where this is a part of one.
    """
    added = [Keystream(seed, words.dtype, begin) for seed in plus]
    subtracted = [Keystream(seed, words.dtype, begin) for seed in minus]
    mask_block_by_block_(words, added, subtracted)


def mask_block_by_block_(words: np.ndarray, added: Sequence[Keystream], subtracted: Sequence[Keystream]) -> None:
    """Add and subtract the next words of streams, in place."""
    size = words_per_block(words.dtype)
    for start in range(0, words.size, size):
        block = words[start : start + size]
        for stream in added:
            block += stream.words(block.size)
        for stream in subtracted:
            block -= stream.words(block.size)


def _encryptor(seed: bytes, counter: int) -> CipherContext:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, this one has {len(seed)}")
    return Cipher(algorithms.AES(seed), modes.CTR(counter.to_bytes(_CIPHER_BLOCK, "big"))).encryptor()
