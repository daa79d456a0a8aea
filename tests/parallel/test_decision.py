"""Choice of fetched experts: never costlier than a fixed mode, close to the optimum, mixed if some experts are hot."""

import pytest
import torch

from ldmole_dist.parallel.decision import GroupSizes, choose_fetched_experts, optimal_fetched_experts
from ldmole_dist.study.bench.decide import CELLS, Cell, all_or_none, decide, draw_support, payload


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_never_costlier_than_fixed_modes(cell: Cell) -> None:
    found = decide(cell)
    assert found["auto"] <= min(found["all_to_all"], found["gather"])


@pytest.mark.parametrize("seed", range(40))
def test_within_two_percent_of_the_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    P, G, R, T = pick(2, 4), pick(1, 2), pick(2, 8, 32, 64), pick(16, 64, 256)
    L = pick(1, 2, 3) if G == 2 else pick(1, 2, 4, 6)
    sizes = GroupSizes(64, (64, 32)[:G], (R,) * G, L)
    support = draw_support(G, T, P, L, min(1.5 + pick(0, 1), P * L), pick(0, 1, 2), seed)
    best = payload(support, optimal_fetched_experts(support, 0, sizes), sizes)
    assert payload(support, choose_fetched_experts(support, 0, sizes), sizes) <= 1.02 * best


def test_no_expert_is_fetched_if_experts_are_large() -> None:
    sizes = GroupSizes(512, (512,), (32,), 16)
    support = draw_support(1, 64, 4, 16, 2.0, 0.0, seed=0)  # E = 64, r = 32, T = 64
    assert not choose_fetched_experts(support, 0, sizes).any()


def test_all_experts_are_fetched_at_the_papers_settings() -> None:
    sizes = GroupSizes(2048, (2048,), (8,), 2)
    support = draw_support(1, 4096, 4, 2, 2.0, 0.0, seed=0)  # E = r = 8, k = 2
    fetched = choose_fetched_experts(support, 0, sizes)
    assert fetched[1:].all() and not fetched[0].any()
    row_per_pair = int(support[:, :, 1:].sum()) * (2048 + 2048)
    assert row_per_pair / payload(support, fetched, sizes) >= 80


def test_payload_is_a_tenth_of_a_row_per_pair_with_64_experts() -> None:
    sizes = GroupSizes(2048, (2048,), (8,), 16)
    support = draw_support(1, 4096, 4, 16, 2.0, 0.0, seed=0)  # E = 64, r = 8
    row_per_pair = int(support[:, :, 1:].sum()) * (2048 + 2048)
    assert row_per_pair / payload(support, choose_fetched_experts(support, 0, sizes), sizes) >= 10


def test_only_hot_experts_are_fetched_under_skew() -> None:
    sizes = GroupSizes(512, (512,), (16,), 16)
    support = draw_support(1, 256, 4, 16, 2.0, 1.5, seed=1)
    fetched = choose_fetched_experts(support, 0, sizes)
    assert fetched[1:].any() and not fetched[1:].all()
    auto = payload(support, fetched, sizes)
    assert auto < 0.95 * min(
        payload(support, all_or_none(support, False), sizes), payload(support, all_or_none(support, True), sizes)
    )


def test_nothing_is_sent_without_active_pairs() -> None:
    sizes = GroupSizes(64, (64,), (8,), 2)
    for support in (torch.zeros(1, 100, 4, 2, dtype=torch.bool), torch.zeros(1, 0, 4, 2, dtype=torch.bool)):
        fetched = choose_fetched_experts(support, 0, sizes)
        assert not fetched.any() and payload(support, fetched, sizes) == 0
