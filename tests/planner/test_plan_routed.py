"""Expectations about routing against drawn routing, counted by `parallel.plan`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from ldmole_dist.parallel.plan import cheapest_ships, elements
from ldmole_dist.planner.routed import moves, payload, sizes_of
from ldmole_dist.planner.shapes import Group
from ldmole_dist.planner.traffic import collectives, messages, traffic
from ldmole_dist.planner.workload import Strategy, Workload

GROUP = Group("layers.0.self_attn.q_proj", 64, (64, 16, 16))


def workload(active: float, tokens: int = 2000, rank: int = 8) -> Workload:
    llama = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return Workload(llama, num_experts=16, rank=rank, micro_batch=1, seq=tokens, active=active)


def drawn(active: float, tokens: int, ranks: int) -> torch.Tensor:
    """(G, T, P, L): each token its number of experts of 16, each linear for itself."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, tokens, 16, generator=generator)
    counts = int(active) + (torch.rand(3, tokens, 1, generator=generator) < active % 1)
    return (scores.argsort(-1).argsort(-1) < counts).view(3, tokens, ranks, 16 // ranks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("active", [1.0, 2.4, 16.0])
def test_rows_are_what_is_drawn_on_average(active: float, ranks: int) -> None:
    w, s = workload(active), Strategy(ranks, 1, ranks, "all_to_all")
    sizes = sizes_of(GROUP, w, s)
    none = torch.zeros(ranks, 3, sizes.experts, dtype=torch.bool)
    counted = elements(drawn(active, w.tokens, ranks), none, 0, sizes)
    predicted = payload(moves(GROUP, w, s), sizes)
    for kind, number in counted.items():
        tolerance = 0 if w.dense else 0.05  # 2000 tokens are drawn
        assert predicted[kind] == pytest.approx(number, rel=tolerance, abs=1e-6), kind


@pytest.mark.parametrize(("tokens", "rank"), [(20, 16), (2000, 4)])
def test_auto_is_what_the_dispatch_decides(tokens: int, rank: int) -> None:
    w, s = workload(1.0, tokens, rank), Strategy(4, 1, 4, "auto")
    sizes = sizes_of(GROUP, w, s)
    support = drawn(1.0, tokens, 4)
    counted = elements(support, cheapest_ships(support, 0, sizes), 0, sizes)
    predicted = payload(moves(GROUP, w, s), sizes)
    assert (predicted["weights"] > 0) == (tokens == 2000) == (counted["weights"] > 0)
    # The dispatch looks at each expert and can only be cheaper.
    assert 0.8 * sum(predicted.values()) < sum(counted.values()) < 1.1 * sum(predicted.values())


def test_recomputation_repeats_what_moved_and_accumulation_everything() -> None:
    w, s = workload(2.0), Strategy(2, 2, 2, "gather")
    plain, again = (traffic(w, replace(s, checkpointing=c)) for c in (False, True))
    assert plain["again_weights"] == 0 and again["again_weights"] == again["weights"] == plain["weights"] > 0
    twice = traffic(replace(w, accumulation=2), s)
    assert twice["weights"] == 2 * again["weights"] and twice["reduce"] == 2 * again["reduce"]
    assert twice["update"] == again["update"]
    assert traffic(replace(w, accumulation=2), replace(s, stage=1))["reduce"] == again["reduce"]
    assert messages(w, s)["dispatch"] == 7 * 4 and messages(w, replace(s, checkpointing=False))["dispatch"] == 5 * 4


def test_what_a_ring_sends() -> None:
    w = workload(2.0)
    reduce, update = (c for c in collectives(w, Strategy(4, 1)) if c.kind in ("reduce", "update"))
    assert reduce.sent == 2 * reduce.elements * 3 / 4 and update.sent == update.elements * 3 / 4
    assert traffic(w, Strategy(1, 1)) == {"reduce": 0.0, "norm": 0.0}
