"""Placement of experts on ranks, and initialization that does not depend on it."""

import pytest
import torch

from ldmole_dist.parallel.placement import Placement, draw_bank, seeded

E, R, D, O = 8, 3, 64, 5


def draw(size: int = 1, rank: int = 0, seed: int = 0, name: str = "q", dtype: torch.dtype = torch.float32):
    return draw_bank(Placement(E, size, rank), R, D, O, seed, name, torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_hold_consecutive_disjoint_experts(size: int) -> None:
    held = [range(E)[Placement(E, size, rank).local] for rank in range(size)]
    assert [expert for experts in held for expert in experts] == list(range(E))
    assert {len(experts) for experts in held} == {E // size}


@pytest.mark.parametrize("size", [3, 16])
def test_uneven_placement_error_lists_divisors(size: int) -> None:
    with pytest.raises(ValueError, match=rf"ep_size={size} does not divide num_experts=8; use one of \[1, 2, 4, 8\]"):
        Placement(E, size)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_experts_are_the_same_under_every_placement(size: int) -> None:
    A, B = draw()
    parts = [draw(size, rank) for rank in range(size)]
    assert A.equal(torch.cat([part[0] for part in parts])) and B.equal(torch.cat([part[1] for part in parts]))
    assert parts[0][0].shape == (E // size, R, D) and parts[0][1].shape == (E // size, O, R)


def test_initial_A_is_kaiming_uniform_and_B_is_zero() -> None:
    A, B = draw()
    assert not B.any()
    assert 0.98 * D**-0.5 < float(A.abs().max()) <= D**-0.5
    assert float(A.std()) == pytest.approx((3 * D) ** -0.5, rel=0.05)


def test_experts_modules_and_seeds_differ() -> None:
    A, _ = draw()
    assert all(not A[i].equal(A[j]) for i in range(E) for j in range(i))
    assert not A.equal(draw(seed=1)[0]) and not A.equal(draw(name="k")[0])
    # Names are separated: ("a", "bc") and ("ab", "c") give different seeds.
    assert seeded(0, "a", "bc").initial_seed() != seeded(0, "ab", "c").initial_seed()


def test_dtype_follows_model_and_values_do_not_change() -> None:
    A, _ = draw()
    wide, B = draw(dtype=torch.float64)
    assert wide.dtype == B.dtype == torch.float64 and wide.float().equal(A)


def test_global_generator_does_not_advance() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw()
    assert torch.get_rng_state().equal(before)
