"""Tests of `ldmole bench latency`: the parts compute what the layers compute, and the shares sum to the whole."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel

from ldmole_dist.study.bench import latency
from ldmole_dist.study.bench.latency import PARTS, RecordedCalls, build, decoding_call, measure, shares, training_call
from ldmole_dist.tuner.layer import LdMoleLinear

LAYERS = 2
SIZES = (32, 48, LAYERS, 4, 2, 64)
ADAPTER = {"num_experts": 4, "r": 2, "lambda_hidden": 16}


@pytest.mark.parametrize(("phase", "batch"), [("training", 2), ("generation", 1), ("generation", 3)])
def test_all_parts_are_timed(phase: latency.Phase, batch: int) -> None:
    seconds = measure(small_model(), phase, batch, turns=2)
    assert set(seconds) == {"whole", *PARTS} and min(seconds.values()) > 0


def small_model() -> PeftModel:
    return build(SIZES, ADAPTER, torch.device("cpu"))


def test_all_candidates_run_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    linears = [m for m in model.modules() if isinstance(m, LdMoleLinear)]
    # The warm-up, the turn that finds the slowest candidate, another warm-up, and two turns of two runs, as 0.2 s fit into
    # 0.3 s twice.
    of_whole, ran = iter([9.0, 0.2, 9.0, 0.3, 0.25, 0.2, 0.4]), Counter[str]()

    def forward_backward(run: Callable[[], Any]) -> None:
        frozen = all(linear.disable_adapters for linear in linears)
        name = "frozen" if frozen else run.args[0] if isinstance(run, partial) else "whole"
        ran[name] += 1
        seconds.append(next(of_whole) if name == "whole" else 0.01)

    seconds: list[float] = []
    monkeypatch.setattr(latency, "_forward_backward", forward_backward)
    monkeypatch.setattr(latency, "timed", lambda run, device: run() or seconds[-1])
    result = measure(model, "generation", 1, turns=2)
    assert ran == dict.fromkeys(["whole", "frozen", *PARTS[1:]], 7)
    assert result == dict.fromkeys(PARTS, 0.01) | {"whole": (0.25 + 0.2) / 2}


def test_remainder_is_not_spread_over_the_parts() -> None:
    fractions = shares({"whole": 10.0} | dict.fromkeys(PARTS, 1.0))
    assert fractions == pytest.approx(dict.fromkeys(PARTS, 0.1) | {"remainder": 0.6})
    assert list(fractions) == [*PARTS, "remainder"]


def test_parts_compute_what_the_layers_compute() -> None:
    model = small_model()
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
        calls = RecordedCalls(model, call)
        for hook in hooks:
            hook.remove()
        # One lambda for q, k, v and one for gate, up.
        assert len(calls.replay("lambda-MLP")) == 4 * LAYERS
        outputs = [y for y in calls.replay("experts") if y.is_floating_point()]
        for linear, delta in zip(linears, outputs, strict=True):
            x, y = seen[linear]
            assert x.shape[:2] == (3, 1)  # one token of each sequence, as the others are in the cache
            torch.testing.assert_close(linear.base_layer(x).flatten(0, 1) + delta, y.flatten(0, 1))


def test_replayed_parts_have_gradients_in_training() -> None:
    model = small_model()
    calls = RecordedCalls(model, training_call(model, torch.randint(0, 64, (3, 9))))
    for part in PARTS[1:]:
        outputs = [y for y in calls.replay(part) if y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    adapter = [p for name, p in model.named_parameters() if "lora_" in name or "router" in name or "lambda" in name]
    assert adapter and all(p.grad is not None for p in adapter)


def test_decoding_leaves_the_cache_unchanged() -> None:
    model = small_model()
    model.eval()
    with torch.no_grad():
        call = decoding_call(model, torch.randint(0, 64, (2, 5)))
        torch.testing.assert_close(call()[0], call()[0])
