"""The constant-memory permutation is a bijection and looks random."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmole_dist.data.permutation import Permutation


@given(size=st.integers(1, 700), key=st.integers(0, 10**9))
def test_is_a_bijection(size: int, key: int) -> None:
    permutation = Permutation(size, key, 3)
    assert sorted(map(permutation, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [5, 1000, 65536])
def test_each_key_gives_another_order(size: int) -> None:
    orders = {tuple(map(Permutation(size, seed, epoch), range(size))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_looks_random() -> None:
    size = 20_000
    order = list(map(Permutation(size, 0, 0), range(size)))
    # For independent uniform numbers, |a - b| is n/3 on average; checked for position and image, and for neighbors.
    for others in (range(size), order[1:]):
        distance = sum(abs(a - b) for a, b in zip(order, others, strict=False)) / size
        assert abs(distance - size / 3) < 0.02 * size
    first_half = sum(position < size // 2 for position in order[: size // 2])
    assert abs(first_half - size / 4) < 0.02 * size
