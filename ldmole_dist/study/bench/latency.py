"""Measure the latency of lambda-MLP, router and experts in training and generation: `ldmole bench latency`.

"whole" is a model with an adapter on all seven linears of a layer, "frozen model" the same model with the adapter
disabled. The calls of lambda-MLP, router and experts in one forward are recorded, and each part is timed by replaying
its calls with the same arguments. All candidates run in turns, and each runs the same number of times per turn. The
fastest run of each turn is kept, since other programs can slow a single run down by a multiple; the result is the
median over turns.

"remainder" is the difference between the whole and the sum of the parts: dropout, auxiliary losses, sums of outputs and
of gradients, hooks, and the warmer caches of a part that is timed alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple
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

PARTS = ("frozen model", "lambda-MLP", "router", "experts")
ADAPTER = "default"
# Runs of each candidate per turn: as many as the slowest candidate needs to fill TURN_SECONDS, at most TURN_RUNS.
TURN_SECONDS, TURN_RUNS = 0.3, 5
SEQ = 64  # tokens per training sequence; in generation, tokens in the key-value cache


class Shape(NamedTuple):
    """Sizes of a Llama.

    Args:
        name: name of the model, for tables.
        hidden: hidden size.
        intermediate: hidden size of the MLP.
        layers: number of decoder layers.
        heads: number of attention heads.
        kv_heads: number of key-value heads.
        vocabulary: number of tokens in the vocabulary.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def cut(self, layers: int) -> Shape:
        """Return a shape with fewer layers, and a smaller vocabulary so that the head keeps its share of the time."""
        name = f"{self.name}, {layers} of {self.layers} layers"
        return self._replace(name=name, layers=layers, vocabulary=self.vocabulary * layers // self.layers)


SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152)
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256)


class Settings(NamedTuple):
    """Settings of the benchmark.

    Args:
        shapes: models to measure.
        training: batch sizes of the training phase.
        generation: batch sizes of the generation phase.
        turns: timed turns.
        experts: experts per linear, E.
        lora_rank: LoRA rank of an expert, r.
        hidden: hidden units of the lambda-MLP.
    """

    shapes: tuple[Shape, ...] = (SMOLLM2, LLAMA_1B.cut(2))
    training: tuple[int, ...] = (1, 4, 16)
    generation: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    turns: int = 5
    experts: int = 8
    lora_rank: int = 8
    hidden: int = 256


QUICK = Settings((SMOLLM2.cut(3), LLAMA_1B.cut(1)), training=(1, 8), generation=(1, 4, 16, 64), turns=2)


class Latency(NamedTuple):
    """Latency of one model in one phase with one batch size.

    In training it is the time of a forward and backward, in generation that of one token per sequence.

    Attributes:
        shape: name of the model.
        phase: "training" or "generation".
        batch: number of sequences.
        whole: median seconds of the model with its adapter.
        parts: name in `PARTS` -> median seconds.
        dtype: dtype of the frozen weights and of the activations.
    """

    shape: str
    phase: Phase
    batch: int
    whole: float
    parts: dict[str, float]
    dtype: str

    @property
    def remainder(self) -> float:
        """Seconds of the whole minus the seconds of all parts; negative if the parts took longer when timed alone."""
        return self.whole - sum(self.parts.values())

    def shares(self) -> dict[str, float]:
        """Return each part and the remainder as a fraction of the whole; the fractions sum to 1."""
        return {name: s / self.whole for name, s in (*self.parts.items(), ("remainder", self.remainder))}

    def row(self) -> dict[str, object]:
        """Return a table row: model, phase, batch size, milliseconds of the whole, and the shares in percent."""
        shares = {f"{name} %": f"{100 * share:.1f}" for name, share in self.shares().items()}
        return {"model": self.shape, "phase": self.phase, "batch": self.batch, "whole ms": 1e3 * self.whole, **shares}


def bench_latency(settings: Settings) -> list[Latency]:
    """Measure all shapes in one new process: in bfloat16 on a GPU, or in float32 on one CPU thread without one."""
    results = []
    with LocalRanks(1, timeout=3600) as ranks:
        for shape in tqdm(settings.shapes, desc="latency", unit="shape", leave=False):
            results += ranks.run(measure_shape, shape, settings)[0]
    return results


def measure_shape(shape: Shape, settings: Settings) -> list[Latency]:
    """Measure one shape in this process, with all batch sizes of both phases."""
    model = build(shape, settings, start().device)
    cases: list[tuple[Phase, int]] = [("training", batch) for batch in settings.training]
    cases += [("generation", batch) for batch in settings.generation]
    return [measure(model, shape, phase, batch, settings.turns) for phase, batch in cases]


def build(shape: Shape, settings: Settings, device: torch.device) -> PeftModel:
    """Return a Llama with random weights and a new adapter on all linears: bfloat16 on a GPU, float32 on a CPU."""
    config = llama_config(*shape[1:], tie_word_embeddings=True)
    precision = "fp32" if device.type == "cpu" else "bf16"
    adapter = dict(num_experts=settings.experts, r=settings.lora_rank, lambda_hidden=settings.hidden)
    model = random_model(config, adapter, device, precision)
    model.enable_input_require_grads()  # otherwise the frozen model has no backward
    return model


def measure(model: PeftModel, shape: Shape, phase: Phase, batch: int, turns: int) -> Latency:
    """Measure the whole model, the frozen model and the parts of the adapter in one phase, with one batch size.

    Args:
        model: model returned by `build`.
        shape: shape passed to `build`.
        phase: "training" or "generation".
        batch: number of sequences.
        turns: timed turns.
    """
    device = next(model.parameters()).device
    model.train(phase == "training")
    ids = torch.randint(0, shape.vocabulary, (batch, SEQ + 1), device=device)
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
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Latency(shape.name, phase, batch, medians.pop("whole"), medians, dtype)


def _forward_backward(run: Callable[[], Sequence[Tensor]]) -> None:
    outputs = run()
    if torch.is_grad_enabled():
        differentiable = [y for y in outputs if y.requires_grad]
        torch.autograd.backward(differentiable, [torch.ones_like(y) for y in differentiable])


def training_call(model: Any, ids: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that runs a forward and returns the loss.

    As in the quickstart, the loss is on the last token of each sequence. It includes the auxiliary losses.

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

    Floating-point tensors are copied; parameters and other tensors are passed as they are.

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
        methods: set[tuple[str, Any, str]] = {("lambda-MLP", m.lambda_mlps[ADAPTER], "forward") for m in linears}
        methods |= {("router", m.router[ADAPTER], name) for m in linears for name in ("forward", "decide", "weigh")}
        methods |= {("experts", m.dispatch, name) for m in linears for name in ("decide", "start")}
        with ExitStack() as stack:
            for part, owner, name in methods:
                stack.enter_context(mock.patch.object(owner, name, self._recorder(part, getattr(owner, name))))
            call()

    def _recorder(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any) -> Any:
            self._calls[part].append(partial(method, *tree_map_only(Tensor, self._leaf, args)))
            return method(*args)

        return recorded

    def _leaf(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor
        self.leaves.append(tensor.detach().clone().requires_grad_(torch.is_grad_enabled()))
        return self.leaves[-1]

    def replay(self, part: str) -> list[Tensor]:
        """Repeat the recorded calls of a part, and return the tensors in their results."""
        outputs = []
        for call in self._calls[part]:
            value = call()
            # A dispatch returns a function that waits for its result.
            outputs += tree_leaves(value() if callable(value) else value)
        return [value for value in outputs if isinstance(value, Tensor)]


def main(turns: int) -> None:
    """Measure the default shapes and batch sizes, and print their table."""
    settings = Settings(turns=turns)
    results = bench_latency(settings)
    sizes = f"E={settings.experts}, r={settings.lora_rank}, lambda-MLP of {settings.hidden}, {SEQ} tokens a sequence"
    print(f"Training (forward + backward) and generation (one token); {sizes}; {results[0].dtype}; {setup()}")
    print(markdown_table([latency.row() for latency in results]))
