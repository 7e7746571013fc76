"""Philox4x32-10 and the noise made from it, in NumPy (Salmon et al. 2011).

The contract of the random numbers. Key: the request's 64-bit seed. Counter: (index >> 2, stream << 24 | node, offset
low, offset high), of whose four words `index & 3` is taken. `index` is the token id for noise over a row, the slot for
an acceptance (draft i stands in slot i + 1); `node` is the slot of the row that noise is drawn over; `offset` the
absolute position of the token that the request's row 0 predicts.

Written from the contract, not from the kernels.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "ACCEPT",
    "BONUS",
    "DRAFT",
    "RESIDUAL",
    "TOKEN",
    "acceptance_uniform",
    "gumbel",
    "philox",
    "row_noise",
    "word",
]

# Streams of the contract: what a draw is for.
TOKEN, DRAFT, ACCEPT, RESIDUAL, BONUS = 0, 1, 2, 3, 4

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: tuple, key: tuple) -> tuple[np.ndarray, ...]:
    """Ten rounds of Philox4x32. counter: four, key: two uint32 values or arrays that broadcast. Returns four words."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, dtype=np.uint64) for k in key)
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 32 x 32 -> 64 bits, never overflows
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & _LOW, (a >> np.uint64(32)) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return tuple(np.asarray(c).astype(np.uint32) for c in (c0, c1, c2, c3))


def word(seed: int, offset: int, index: np.ndarray | int, stream: int, node: int) -> np.ndarray:
    """The uint32 that belongs to `index` (token id of a row, or tree slot of an acceptance)."""
    index = np.atleast_1d(np.asarray(index, dtype=np.uint64))
    seed, offset = int(seed) % 2**64, int(offset) % 2**64  # int64 as its two's complement bits
    counter = (index >> np.uint64(2), stream << 24 | node, offset & 0xFFFFFFFF, offset >> 32)
    words = np.stack(np.broadcast_arrays(*philox(counter, (seed & 0xFFFFFFFF, seed >> 32))), axis=-1)
    return words[np.arange(index.size), (index & np.uint64(3)).astype(np.int64)]


def gumbel(words: np.ndarray) -> np.ndarray:
    """Noise of the race in float32. v is capped below 1: rounded to 1 it gives -inf, and a lone id loses its draw."""
    v = ((words.astype(np.float64) + 0.5) * 2.0**-32).astype(np.float32)
    v = np.minimum(v, np.float32(1.0 - 2.0**-24))
    return -np.log(-np.log1p(-v))


def row_noise(seed: int, offset: int, vocab_size: int, stream: int, node: int) -> np.ndarray:
    """Race noise of every id of one row, float32 [V]."""
    return gumbel(word(seed, offset, np.arange(vocab_size), stream, node))


def acceptance_uniform(seed: int, offset: int, slot: int) -> float:
    """23 random bits and one half, inside (0, 1) in float32 too."""
    return float(((int(word(seed, offset, slot, ACCEPT, 0)[0]) >> 9) + 0.5) * 2.0**-23)
