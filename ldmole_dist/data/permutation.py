"""A pseudorandom order of n things in constant memory: a Feistel network on the smallest even number of bits that holds n,
walked until it falls among the n (Black and Rogaway 2002)."""

from __future__ import annotations

import hashlib

ROUNDS = 6
_WORD = (1 << 64) - 1


class Permutation:
    """A bijection of 0 .. size - 1.

    Args:
        size: n, at least 1.
        key: numbers that decide which.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)]

    def __call__(self, index: int) -> int:
        """Where `index` goes; on average fewer than four passes."""
        index = self._pass(index)
        while index >= self.size:
            index = self._pass(index)
        return index

    def _pass(self, index: int) -> int:
        mask = (1 << self._half) - 1
        left, right = index >> self._half, index & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self._half | right


def _mixed(x: int) -> int:
    """Every bit of the result depends on every bit of x (the finaliser of SplitMix64)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
