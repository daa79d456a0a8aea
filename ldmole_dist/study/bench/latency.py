"""Measure the latency of lambda-MLP, router and experts in training and generation: `ldmole bench latency`.

"whole" is a model with an adapter on all seven linears of every decoder layer, "frozen model" the same model with the
adapter disabled. The calls of lambda-MLP, router and experts in one forward are recorded, and each of these parts is timed by
replaying its calls with the same arguments. All candidates run in turns, and each runs the same number of times per
turn. The fastest run of each turn is kept, because other programs can make a single run several times slower; the
result is the median over turns.

"remainder" is "whole" minus the frozen model and the three parts. It contains dropout, auxiliary losses, sums of outputs
and of gradients, hooks, and the effect of warmer caches when a part is timed alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm
from transformers import DynamicCache

from ldmole_dist.engine.startup import start
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.machine import setup
from ldmole_dist.study.random_model import llama_config, random_model
from ldmole_dist.study.table import markdown_table
from ldmole_dist.study.timing import time_in_turns, timed
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of

Phase = Literal["training", "generation"]

# Name of a model -> arguments of `llama_config`. The vocabulary of the second model is reduced by the same factor as its number
# of layers, so that the output head takes the same share of the time as in the full model.
MODELS = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152),
    "Llama-3.2-1B, 2 of 16 layers": (2048, 8192, 2, 32, 8, 16032),
}
ADAPTER = {"num_experts": 8, "r": 8, "lambda_hidden": 256}
SEQ = 64  # tokens per training sequence; in generation, tokens in the key-value cache
BATCHES: dict[Phase, tuple[int, ...]] = {"training": (1, 4, 16), "generation": (1, 2, 4, 8, 16, 32, 64)}
PARTS = ("frozen model", "lambda-MLP", "router", "experts")
# Runs of each candidate per turn: as many as the slowest candidate needs to fill TURN_SECONDS, at most TURN_RUNS.
TURN_SECONDS, TURN_RUNS = 0.3, 5


def build(sizes: Sequence[int], adapter: Mapping[str, int], device: torch.device) -> PeftModel:
    """Return a Llama with random weights and an adapter on all linears of its layers.

    The Llama is bfloat16 on a GPU and float32 on a CPU; the adapter is float32.

    Args:
        sizes: arguments of `llama_config`.
        adapter: fields of `LdMoleConfig`.
        device: device of the model.
    """
    config = llama_config(*sizes, tie_word_embeddings=True)
    model = random_model(config, adapter, device, "fp32" if device.type == "cpu" else "bf16")
    model.enable_input_require_grads()  # otherwise the frozen model has no backward
    return model


def measure(model: PeftModel, phase: Phase, batch: int, turns: int) -> dict[str, float]:
    """Measure the whole model, the frozen model and the parts of the adapter in one phase, with one batch size.

    Args:
        model: model returned by `build`.
        phase: "training" for a forward and backward, "generation" for one token per sequence.
        batch: number of sequences.
        turns: timed turns.

    Returns:
        "whole" and the names in `PARTS` -> seconds of the fastest run in a turn, median over turns.
    """
    device = next(model.parameters()).device
    model.train(phase == "training")
    ids = torch.randint(0, model.config.vocab_size, (batch, SEQ + 1), device=device)
    with torch.set_grad_enabled(phase == "training"):
        call = training_call(model, ids[:, :SEQ]) if phase == "training" else decoding_call(model, ids)
        parts = RecordedCalls(model, call)
        runs = {"whole": call, "frozen model": call} | {part: partial(parts.replay, part) for part in PARTS[1:]}
        leaves = [*parts.leaves, *model.parameters()]

        def time_once(name: str) -> float:
            for leaf in leaves:
                leaf.grad = None
            with model.disable_adapter() if name == "frozen model" else nullcontext():
                return timed(lambda: _forward_backward(runs[name]), device)

        slowest = max(seconds[0] for seconds in time_in_turns(list(runs), 1, time_once).values())
        rounds = min(TURN_RUNS, math.ceil(TURN_SECONDS / slowest))
        seconds = time_in_turns(list(runs), turns, time_once, rounds)
    return {name: statistics.median(values) for name, values in seconds.items()}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each part and the remainder as a fraction of the whole; the fractions sum to 1.

    The remainder is negative if the separately timed parts sum to more than the whole.

    Args:
        seconds: result of `measure`.
    """
    fractions = {name: seconds[name] / seconds["whole"] for name in PARTS}
    return fractions | {"remainder": 1 - sum(fractions.values())}


def _forward_backward(run: Callable[[], Sequence[Tensor]]) -> None:
    """Call `run` and, if gradients are enabled, run the backward of its outputs with gradients of 1."""
    outputs = run()
    if torch.is_grad_enabled():
        differentiable = [y for y in outputs if y.requires_grad]
        torch.autograd.backward(differentiable, [torch.ones_like(y) for y in differentiable])


def training_call(model: Any, ids: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that runs a forward and returns the loss in a list.

    As in the quickstart, the task loss is the cross entropy of each sequence's last token. The auxiliary losses are added.

    Args:
        model: model with an adapter.
        ids: (batch, positions) token ids.
    """
    context = tuner_of(model).context

    def call() -> list[Tensor]:
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1).logits
        loss = torch.nn.functional.cross_entropy(logits[:, -1].float(), ids[:, -1])
        return [loss + context.auxiliary_loss()]

    return call


def decoding_call(model: Any, ids: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that runs a forward of each sequence's last token, with the other tokens in a key-value cache.

    The function removes its token from the cache afterwards, so every call does the same work.

    Args:
        model: model with an adapter.
        ids: (batch, positions) token ids.
    """
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)

    def call() -> list[Tensor]:
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-1)
        return [logits]

    return call


class RecordedCalls:
    """Records the calls of the adapter's parts in one forward, with their arguments, and replays them part by part.

    Floating-point tensors in the arguments are copied, except parameters; all other arguments are passed as they are.

    Args:
        model: model with an adapter.
        call: function that runs the forward to record.

    Attributes:
        leaves: the copied tensors. If gradients are enabled, the backward of a replay computes their gradients.
    """

    def __init__(self, model: PeftModel, call: Callable[[], object]) -> None:
        self.leaves: list[Tensor] = []
        self._calls: dict[str, list[Callable[[], Any]]] = {part: [] for part in PARTS[1:]}
        linears = [m for m in model.modules() if isinstance(m, LdMoleLinear)]
        methods: set[tuple[str, Any, str]] = {("lambda-MLP", m.lambda_mlps["default"], "forward") for m in linears}
        routers: list[Any] = [m.ldmole_adapters["default"].router for m in linears]
        methods |= {("router", router, name) for router in routers for name in ("forward", "decide", "weigh")}
        methods |= {("experts", m.dispatch, name) for m in linears for name in ("decide", "start")}
        with ExitStack() as stack:
            for part, owner, name in methods:
                stack.enter_context(mock.patch.object(owner, name, self._recorder(part, getattr(owner, name))))
            call()

    def _recorder(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that records each call of `method` for replays of `part`, and then makes the call."""

        def recorded(*args: Any) -> Any:
            self._calls[part].append(partial(method, *tree_map_only(Tensor, self._leaf, args)))
            return method(*args)

        return recorded

    def _leaf(self, tensor: Tensor) -> Tensor:
        """Return the tensor to use in replays: `tensor` if it is a parameter or not floating-point, otherwise a leaf copy."""
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor
        self.leaves.append(tensor.detach().clone().requires_grad_(torch.is_grad_enabled()))
        return self.leaves[-1]

    def replay(self, part: str) -> list[Tensor]:
        """Repeat the recorded calls of a part, and return the tensors in their results."""
        outputs = []
        for call in self._calls[part]:
            value = call()
            # `Dispatch.start` returns a function that computes the experts.
            outputs += tree_leaves(value() if callable(value) else value)
        return [value for value in outputs if isinstance(value, Tensor)]


def measure_model(name: str, turns: int) -> list[dict[str, object]]:
    """Return one table row for each phase and batch size of a model in `MODELS`, with shares in percent."""
    model = build(MODELS[name], ADAPTER, start().device)
    rows: list[dict[str, object]] = []
    for phase, batches in BATCHES.items():
        for batch in batches:
            seconds = measure(model, phase, batch, turns)
            row = {"model": name, "phase": phase, "batch": batch, "whole ms": 1e3 * seconds["whole"]}
            rows.append(row | {f"{part} %": f"{100 * share:.1f}" for part, share in shares(seconds).items()})
    return rows


def main(turns: int) -> None:
    """Measure all models in a new process and print their table.

    On a CPU, the process uses OMP_NUM_THREADS threads, or one if the variable is not set.
    """
    with LocalRanks(1, timeout=3600) as ranks:
        rows = [row for name in tqdm(MODELS, leave=False) for row in ranks.run(measure_model, name, turns)[0]]
    sizes = ", ".join(f"{name} {value}" for name, value in ADAPTER.items())
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    print(
        f"Training (forward + backward) and generation (one token), {dtype}; {sizes}, {SEQ} tokens a sequence; {setup()}"
    )
    print(markdown_table(rows))
