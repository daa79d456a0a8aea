"""The latency benchmark runs what the layers run, and its shares are shares of the whole (times are not asserted)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench import latency as bench_latency
from ldmole_dist.study.bench.latency import PARTS, Latency, Settings, Shape, build, measure_shape, print_table
from ldmole_dist.study.bench.latency import _decoding_call as decoding_call
from ldmole_dist.study.bench.latency import _given as given
from ldmole_dist.study.bench.latency import _Parts as Parts
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of

SMALL = Shape("small", 32, 48, layers=2, heads=4, kv_heads=2, vocabulary=64)
SETTINGS = Settings((SMALL,), training=(2,), generation=(1, 3), turns=2, experts=4, rank=2, hidden=16)


def test_shares_are_of_the_whole_and_sum_to_one(ranks1: LocalRanks, capsys: pytest.CaptureFixture[str]) -> None:
    results = ranks1.run(measure_shape, SMALL, SETTINGS)[0]
    assert [(r.phase, r.batch) for r in results] == [("training", 2), ("generation", 1), ("generation", 3)]
    for r in results:
        assert tuple(r.parts) == PARTS and min(r.parts.values()) > 0
        assert sum(r.shares().values()) == pytest.approx(1)
        assert sum(r.shares().values()) * r.whole == pytest.approx(sum(r.parts.values()) + r.remainder)
    print_table(results, SETTINGS)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*PARTS, "remainder")) and "small, generation" in printed


def test_all_run_in_turns_and_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SMALL, SETTINGS, torch.device("cpu"))
    linears = [m for m in model.modules() if isinstance(m, LdMoleLinear)]
    of_whole, ran = (
        iter([9.0, 0.2, 0.3, 0.25, 0.2, 0.4]),
        [],
    )  # two that warm up, two turns of two: 0.2 s go into 0.3 s twice

    def timed(run: Callable[[], Any], leaves: list[torch.Tensor], device: torch.device) -> float:
        frozen = all(linear.disable_adapters for linear in linears)
        ran.append("frozen" if frozen else run.__name__)
        return next(of_whole) if ran[-1] == "call" else 0.01

    monkeypatch.setattr(bench_latency, "_timed", timed)
    result = bench_latency.measure(model, SMALL, "generation", 1, turns=2)
    assert ran == ["call", "frozen", "lambdas", "routers", "experts", "rest"] * 6
    assert result.whole == (0.25 + 0.2) / 2 and set(result.parts.values()) == {0.01}


def test_the_remainder_is_shown_and_not_spread_over_the_parts() -> None:
    result = Latency("small", "generation", 1, 10.0, dict.fromkeys(PARTS, 1.0), "float32")
    assert result.remainder == 5.0 and result.shares() == dict.fromkeys(PARTS, 0.1) | {"remainder": 0.5}


def test_parts_are_what_the_layers_compute() -> None:
    model = build(SMALL, SETTINGS, torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        seen: dict[LdMoleLinear, tuple[torch.Tensor, torch.Tensor]] = {}
        linears = [m for m in model.modules() if isinstance(m, LdMoleLinear)]
        ids = torch.randint(0, 64, (3, 9))
        call = decoding_call(model, ids)
        hooks = [m.register_forward_hook(lambda m, args, y: seen.__setitem__(m, (args[0], y))) for m in linears]
        parts = Parts(given(model, call), tuner_of(model).context)
        for hook in hooks:
            hook.remove()
        members = [m for g in parts.given for m in g.linears]
        assert set(members) == set(linears) and len(parts.given) == 4 * SMALL.layers
        # Once for q, k, v and once for gate, up; a router and experts for each linear.
        assert len(parts.lambdas()) == 4 * SMALL.layers and sum(map(len, parts.routers())) == 7 * SMALL.layers
        for member, delta in zip(members, parts.experts(), strict=True):
            x, y = seen[member]
            assert x.shape[:2] == (3, 1)  # one token for each sequence, the others are in the cache
            torch.testing.assert_close(member.base_layer(x).flatten(0, 1) + delta, y.flatten(0, 1))


def test_decoding_leaves_the_cache_as_it_was() -> None:
    model = build(SMALL, SETTINGS, torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        call = decoding_call(model, torch.randint(0, 64, (2, 5)))
        torch.testing.assert_close(call()[0], call()[0])


def test_a_cut_shape_keeps_the_share_of_its_head() -> None:
    cut = Shape("model", 32, 48, layers=30, heads=4, kv_heads=2, vocabulary=3000).cut(3)
    assert cut.layers / cut.vocabulary == 30 / 3000 and cut.name == "model, 3 of 30 layers"
