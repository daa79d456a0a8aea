"""Expected traffic of experts compared with random routing, counted by `parallel.decision`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from ldmole_dist.parallel.decision import choose_fetched_experts, payload_elements
from ldmole_dist.planner.expert_costs import dispatch_volume, group_sizes, payload
from ldmole_dist.planner.shapes import Group
from ldmole_dist.planner.traffic import collective_calls, collectives, elements_sent
from ldmole_dist.planner.workload import Strategy, Workload

GROUP = Group("layers.0.self_attn.q_proj", 64, (64, 16, 16))


def workload(active: float, tokens: int = 2000, lora_rank: int = 8) -> Workload:
    llama = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return Workload(llama, num_experts=16, lora_rank=lora_rank, micro_batch=1, seq=tokens, active=active)


def drawn(active: float, tokens: int, ranks: int) -> torch.Tensor:
    """Draw (G, T, P, L) supports of 16 experts, independently for each token and linear."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, tokens, 16, generator=generator)
    counts = int(active) + (torch.rand(3, tokens, 1, generator=generator) < active % 1)
    return (scores.argsort(-1).argsort(-1) < counts).view(3, tokens, ranks, 16 // ranks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("active", [1.0, 2.4, 16.0])
def test_payload_equals_the_average_of_random_routing(active: float, ranks: int) -> None:
    w, s = workload(active), Strategy(ranks, 1, ranks, "all_to_all")
    sizes = group_sizes(GROUP, w, s)
    none = torch.zeros(ranks, 3, sizes.experts, dtype=torch.bool)
    counted = payload_elements(drawn(active, w.tokens, ranks), none, 0, sizes)
    predicted = payload(dispatch_volume(GROUP, w, s), sizes)
    for kind, number in counted.items():
        tolerance = 0 if w.dense else 0.05  # sampling error of 2000 tokens
        assert predicted[kind] == pytest.approx(number, rel=tolerance, abs=1e-6), kind


@pytest.mark.parametrize(("tokens", "lora_rank"), [(20, 16), (2000, 4)])
def test_auto_agrees_with_the_dispatch(tokens: int, lora_rank: int) -> None:
    w, s = workload(1.0, tokens, lora_rank), Strategy(4, 1, 4, "auto")
    sizes = group_sizes(GROUP, w, s)
    support = drawn(1.0, tokens, 4)
    counted = payload_elements(support, choose_fetched_experts(support, 0, sizes), 0, sizes)
    predicted = payload(dispatch_volume(GROUP, w, s), sizes)
    assert (predicted["weights"] > 0) == (tokens == 2000) == (counted["weights"] > 0)
    # The dispatch decides per expert, so it can only send less.
    assert 0.8 * sum(predicted.values()) < sum(counted.values()) < 1.1 * sum(predicted.values())


def test_traffic_scales_with_recomputation_and_accumulation() -> None:
    w, s = workload(2.0), Strategy(2, 2, 2, "gather")
    plain, again = (elements_sent(w, replace(s, checkpointing=c)) for c in (False, True))
    assert plain["again_weights"] == 0 and again["again_weights"] == again["weights"] == plain["weights"] > 0
    twice = elements_sent(replace(w, accumulation=2), s)
    assert twice["weights"] == 2 * again["weights"] and twice["reduce"] == 2 * again["reduce"]
    assert twice["update"] == again["update"]
    assert elements_sent(replace(w, accumulation=2), replace(s, stage=1))["reduce"] == again["reduce"]
    assert (
        collective_calls(w, s)["dispatch"] == 7 * 4
        and collective_calls(w, replace(s, checkpointing=False))["dispatch"] == 5 * 4
    )


def test_ring_collectives_by_hand() -> None:
    w = workload(2.0)
    reduce, update = (c for c in collectives(w, Strategy(4, 1)) if c.kind in ("reduce", "update"))
    assert reduce.sent == 2 * reduce.elements * 3 / 4 and update.sent == update.elements * 3 / 4
    assert elements_sent(w, Strategy(1, 1)) == {"reduce": 0.0, "norm": 0.0}
