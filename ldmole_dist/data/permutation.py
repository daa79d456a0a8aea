"""Pseudorandom permutation of the integers 0 to n - 1 in constant memory.

A Feistel network permutes all integers of 2 b bits, with the smallest b >= 1 such that n - 1 fits. It is applied repeatedly
until the result is below n (cycle walking; Black and Rogaway, 2002).
"""

from __future__ import annotations

import hashlib

ROUNDS = 6
_WORD = (1 << 64) - 1


class Permutation:
    """Pseudorandom permutation of the integers 0 to n - 1.

    Args:
        size: n, at least 1.
        key: integers that select the permutation; the same key gives the same permutation.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[i : i + 8]) for i in range(0, len(digest), 8)]

    def __call__(self, index: int) -> int:
        """Return the integer that `index` is mapped to.

        The network permutes at most 4 n integers, so a call takes at most 4 passes through the network on average.
        """
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
    """Apply the finalizer of SplitMix64 to a 64-bit integer: every output bit depends on every input bit."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31
