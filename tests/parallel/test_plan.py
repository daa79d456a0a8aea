"""The decision what to move: never worse than a fixed strategy, as good as the optimum, and a mixture where only that is."""

import pytest
import torch

from ldmole_dist.parallel.plan import GroupSizes, cheapest_ships, optimal_ships
from ldmole_dist.study.bench.decide import CELLS, Cell, all_or_none, decide, draw_support, payload


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_never_worse_than_either_fixed_strategy(cell: Cell) -> None:
    found = decide(cell)
    assert found.auto <= min(found.all_to_all, found.gather)


@pytest.mark.parametrize("seed", range(40))
def test_within_two_percent_of_the_optimum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    P, G, R, T = pick(2, 4), pick(1, 2), pick(2, 8, 32, 64), pick(16, 64, 256)
    L = pick(1, 2, 3) if G == 2 else pick(1, 2, 4, 6)
    sizes = GroupSizes(64, (64, 32)[:G], R, L)
    support = draw_support(G, T, P, L, min(1.5 + pick(0, 1), P * L), pick(0, 1, 2), seed)
    best = payload(support, optimal_ships(support, 0, sizes), sizes)
    assert payload(support, cheapest_ships(support, 0, sizes), sizes) <= 1.02 * best


def test_rows_win_where_experts_are_heavy() -> None:
    sizes = GroupSizes(512, (512,), 32, 16)
    support = draw_support(1, 64, 4, 16, 2.0, 0.0, seed=0)  # E = 64, r = 32, T = 64
    assert not cheapest_ships(support, 0, sizes).any()


def test_experts_win_at_the_papers_settings_by_more_than_80_times() -> None:
    sizes = GroupSizes(2048, (2048,), 8, 2)
    support = draw_support(1, 4096, 4, 2, 2.0, 0.0, seed=0)  # E = r = 8, k = 2
    shipped = cheapest_ships(support, 0, sizes)
    assert shipped[1:].all() and not shipped[0].any()
    row_per_pair = int(support[:, :, 1:].sum()) * (2048 + 2048)
    assert row_per_pair / payload(support, shipped, sizes) >= 80


def test_ten_times_less_than_a_row_for_each_pair_at_512_rank_rows() -> None:
    sizes = GroupSizes(2048, (2048,), 8, 16)
    support = draw_support(1, 4096, 4, 16, 2.0, 0.0, seed=0)  # E = 64, r = 8
    row_per_pair = int(support[:, :, 1:].sum()) * (2048 + 2048)
    assert row_per_pair / payload(support, cheapest_ships(support, 0, sizes), sizes) >= 10


def test_a_mixture_wins_where_some_experts_are_hot() -> None:
    sizes = GroupSizes(512, (512,), 16, 16)
    support = draw_support(1, 256, 4, 16, 2.0, 1.5, seed=1)
    shipped = cheapest_ships(support, 0, sizes)
    assert shipped[1:].any() and not shipped[1:].all()
    auto = payload(support, shipped, sizes)
    assert auto < 0.95 * min(
        payload(support, all_or_none(support, False), sizes), payload(support, all_or_none(support, True), sizes)
    )


def test_an_expert_that_nobody_needs_and_a_rank_without_tokens_move_nothing() -> None:
    sizes = GroupSizes(64, (64,), 8, 2)
    for support in (torch.zeros(1, 100, 4, 2, dtype=torch.bool), torch.zeros(1, 0, 4, 2, dtype=torch.bool)):
        shipped = cheapest_ships(support, 0, sizes)
        assert not shipped.any() and payload(support, shipped, sizes) == 0
