"""Mask vectors of unsigned words with keystreams of AES-256-CTR, modulo 2^16, 2^32 or 2^64.

A seed of 32 bytes is the key of one stream; its counter begins at 0, since no seed is used for two streams. A stream
can be entered at any word, so that a long vector may be worked on tensor by tensor, in any order, by several threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import CipherContext

SEED_BYTES = 32
_CIPHER_BLOCK = 16
_BLOCK_BYTES = 1 << 17
"""Bytes masked at a time: they, and as many of the stream, stay in the processor's cache."""
_ZEROS = bytes(_BLOCK_BYTES)


class Keystreams:
    """Streams to add to a vector and to subtract from it, part by part.

    Args:
        plus: Seeds of the streams to add.
        minus: Seeds of those to subtract.
        dtype: Little-endian unsigned words.
        begin: The first word wanted.
    """

    def __init__(self, plus: Iterable[bytes], minus: Iterable[bytes], dtype: np.dtype, begin: int = 0) -> None:
        self._dtype = dtype
        self._buffer = bytearray(_BLOCK_BYTES + _CIPHER_BLOCK - 1)
        """One for all streams: whatever their number, memory is flat."""
        self._added = [self._from(seed, begin) for seed in plus]
        self._subtracted = [self._from(seed, begin) for seed in minus]

    def apply_(self, words: np.ndarray) -> None:
        """Add and subtract the next words of all streams, in place."""
        size = _BLOCK_BYTES // self._dtype.itemsize
        for start in range(0, words.size, size):
            block = words[start : start + size]
            for cipher in self._added:
                block += self._next(cipher, block.size)
            for cipher in self._subtracted:
                block -= self._next(cipher, block.size)

    def _next(self, cipher: CipherContext, count: int) -> np.ndarray:
        size = count * self._dtype.itemsize
        cipher.update_into(_ZEROS if size == _BLOCK_BYTES else memoryview(_ZEROS)[:size], self._buffer)
        return np.frombuffer(self._buffer, self._dtype, count)

    def _from(self, seed: bytes, begin: int) -> CipherContext:
        counter, skipped = divmod(begin * self._dtype.itemsize, _CIPHER_BLOCK)
        cipher = _encryptor(seed, counter)
        cipher.update_into(_ZEROS[:skipped], self._buffer)
        return cipher


def apply_masks_(words: np.ndarray, *, plus: Iterable[bytes], minus: Iterable[bytes], begin: int = 0) -> None:
    """Add and subtract the streams of seeds, in place and block by block.

    Args:
        words: Contiguous vector of little-endian unsigned words.
        plus: Seeds of the streams to add.
        minus: Seeds of those to subtract.
        begin: Place of the first of these words in the whole vector, where this is a part of one.
    """
    Keystreams(plus, minus, words.dtype, begin).apply_(words)


def _encryptor(seed: bytes, counter: int) -> CipherContext:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, this one has {len(seed)}")
    return Cipher(algorithms.AES(seed), modes.CTR(counter.to_bytes(_CIPHER_BLOCK, "big"))).encryptor()
