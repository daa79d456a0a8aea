"""Pseudorandom permutation of n numbers in constant memory.

A Feistel network permutes the numbers of the smallest even number of bits that can hold n - 1; it is applied repeatedly until
the result is below n (cycle walking; Black and Rogaway, 2002).
"""

from __future__ import annotations

import hashlib

ROUNDS = 6
_WORD = (1 << 64) - 1


class Permutation:
    """Bijection of 0 .. size - 1.

    Args:
        size: n, at least 1.
        key: numbers that select the permutation.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)]

    def __call__(self, index: int) -> int:
        """Return the image of `index`. The network's domain is below 4 n, so this takes fewer than 4 passes on average."""
        index = self._pass(index)
        while index >= self.size:
            index = self._pass(index)
        return index

    def _pass(self, index: int) -> int:
        mask = (1 << self._half) - 1
        left, right = index >> self._half, index & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half | right


def _mix(x: int) -> int:
    """Return the finalizer of SplitMix64, in which every output bit depends on every input bit."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
