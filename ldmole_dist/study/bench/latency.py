"""What lambda-MLP, router and experts cost of the latency of training and of generation: `ldmole bench latency`.

The whole is a model with an adapter on all seven linears; the frozen base is the same model with the adapter disabled. Each
part is run on the model's own modules, over all its layers, with the inputs that they get in the whole, and is counted as
the layer computes it (`InputGroup._route`): lambda once for q, k, v and once for gate, up. All run one after the other and
equally often. Of the runs of a turn the fastest counts, as a machine that does other work too can make one many times
slower, and of the turns the median. The clock of a CPU is the time that its one core computed: nobody else's work counts.
What the parts leave of the whole is shown as the remainder: caches that a part finds warmer alone than in the whole,
gradients of x that are added up, groups and hooks.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ldmole_dist.engine.startup import start
from ldmole_dist.method.context import LossWeights, StepContext
from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.layer import InputGroup, MoELinear
from ldmole_dist.method.routers import Routing
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.dispatch import synchronize
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of

Phase = Literal["training", "generation"]


PARTS = ("frozen model", "lambda-MLP", "router", "experts", "dropout, losses, sums")
ADAPTER = "default"
TURN_SECONDS, TURN_RUNS = 0.3, 5  # of the slowest in a turn; runs of each in a turn, at most
SEQ = 64  # tokens of a training sequence, and of the context that a generated token follows


class Shape(NamedTuple):
    """Of a Llama with `layers` of its layers and as large a part of its vocabulary, so that the head keeps its share."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def cut(self, layers: int) -> Shape:
        """With so many layers."""
        name = f"{self.name}, {layers} of {self.layers} layers"
        return self._replace(name=name, layers=layers, vocabulary=self.vocabulary * layers // self.layers)


SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152)
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256)


class Settings(NamedTuple):
    """What is measured: shapes, batch sizes by phase, turns; E, r, width of the lambda-MLP."""

    shapes: tuple[Shape, ...] = (SMOLLM2, LLAMA_1B.cut(2))
    training: tuple[int, ...] = (1, 4, 16)
    generation: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    turns: int = 5
    experts: int = 8
    rank: int = 8
    hidden: int = 256


QUICK = Settings((SMOLLM2.cut(3), LLAMA_1B.cut(1)), training=(1, 8), generation=(1, 4, 16, 64), turns=2)


class Latency(NamedTuple):
    """Median seconds of one forward and backward of `batch` sequences, or of one token for each of them.

    Args:
        shape: name of the model.
        phase: "training" or "generation".
        batch: sequences.
        whole: the model with its adapter.
        parts: by PARTS.
        dtype: of the activations.
    """

    shape: str
    phase: Phase
    batch: int
    whole: float
    parts: dict[str, float]
    dtype: str

    @property
    def remainder(self) -> float:
        """Seconds of the whole that no part explains; negative where the parts took longer alone."""
        return self.whole - sum(self.parts.values())

    def shares(self) -> dict[str, float]:
        """Of the whole, by part, the remainder included: they sum to 1."""
        return {name: s / self.whole for name, s in (*self.parts.items(), ("remainder", self.remainder))}


def bench_latency(settings: Settings | None = None) -> list[Latency]:
    """Measure in a process of its own: on a GPU in bfloat16, or without one on one core in float32, as a rank has it."""
    settings = settings or Settings()
    results = []
    with LocalRanks(1, timeout=3600) as ranks:
        for shape in tqdm(settings.shapes, desc="latency", unit="shape", leave=False):
            results += ranks.run(measure_shape, shape, settings)[0]
    return results


def measure_shape(shape: Shape, settings: Settings) -> list[Latency]:
    """All batch sizes of both phases, in this process."""
    model = build(shape, settings, start().device)
    cases: list[tuple[Phase, int]] = [("training", batch) for batch in settings.training]
    cases += [("generation", batch) for batch in settings.generation]
    return [measure(model, shape, phase, batch, settings.turns) for phase, batch in cases]


def build(shape: Shape, settings: Settings, device: torch.device) -> PeftModel:
    """A Llama with random weights and a new adapter on all its linears."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    backbone = torch.nn.Module.to(LlamaForCausalLM(config), dtype=dtype, device=device)
    adapter = LdMoleConfig(
        num_experts=settings.experts, r=settings.rank, lambda_hidden=settings.hidden, task_type="CAUSAL_LM"
    )
    model = get_peft_model(backbone, adapter, adapter_name=ADAPTER)
    tuner_of(model).context.weights = LossWeights(balance=1.0)
    model.enable_input_require_grads()  # else the base alone would have no backward
    return model


def measure(model: PeftModel, shape: Shape, phase: Phase, batch: int, turns: int) -> Latency:
    """Whole, base and parts in turns.

    Args:
        model: of `build`.
        shape: that it was built in.
        phase: what is timed.
        batch: sequences.
        turns: of which the median counts, after two runs of each that warm up.
    """
    device = next(model.parameters()).device
    model.train(phase == "training")
    ids = torch.randint(0, shape.vocabulary, (batch, SEQ + 1), device=device)
    with torch.set_grad_enabled(phase == "training"):
        call = _training_call(model, ids[:, :SEQ]) if phase == "training" else _decoding_call(model, ids)
        parts = _Parts(_given(model, call), tuner_of(model).context)
        runs: dict[str, Callable[[], Sequence[Tensor]]] = {
            "whole": call,
            "frozen model": call,
            "lambda-MLP": parts.lambdas,
            "router": parts.routers,
            "experts": parts.experts,
            "dropout, losses, sums": parts.rest,
        }
        leaves = [*parts.leaves(), *model.parameters()]

        def once() -> dict[str, float]:
            seconds = {}
            for name, run in runs.items():
                with model.disable_adapter() if name == "frozen model" else nullcontext():
                    seconds[name] = _timed(run, leaves, device)
            return seconds

        once()
        slowest = max(once().values())
        number = min(TURN_RUNS, math.ceil(TURN_SECONDS / slowest))
        of_turns = [[once() for _ in range(number)] for _ in range(turns)]
    medians = {name: statistics.median(min(s[name] for s in turn) for turn in of_turns) for name in runs}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Latency(shape.name, phase, batch, medians.pop("whole"), medians, dtype)


def _timed(run: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor], device: torch.device) -> float:
    for leaf in leaves:
        leaf.grad = None
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    begun = clock()
    outputs = run()
    if torch.is_grad_enabled():
        wanting = [y for y in outputs if y.requires_grad]
        torch.autograd.backward(wanting, [torch.ones_like(y) for y in wanting])
    synchronize(device)
    return clock() - begun


def _training_call(model: Any, ids: Tensor) -> Callable[[], list[Tensor]]:
    """A forward with the loss on the last token of each sequence, as the quickstart has it."""
    context = tuner_of(model).context

    def call() -> list[Tensor]:
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1).logits
        loss = torch.nn.functional.cross_entropy(logits[:, -1].float(), ids[:, -1])
        return [loss + context.auxiliary_loss()]

    return call


def _decoding_call(model: Any, ids: Tensor) -> Callable[[], list[Tensor]]:
    """One token after a context that is in the cache."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)

    def call() -> list[Tensor]:
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-1)
        return [logits]

    return call


class _Given(NamedTuple):
    """An input group of the model and what it got and decided in a forward; tensors are leaves."""

    linears: list[MoELinear]
    x: Tensor
    lam_T: Tensor
    routing: Routing  # (G, T, E)
    y: list[Tensor]

    @property
    def x_TD(self) -> Tensor:
        return self.x.reshape(-1, self.x.shape[-1])


def _given(model: PeftModel, call: Callable[[], Any]) -> list[_Given]:
    """Every input group's part in one `call`."""
    inputs: dict[MoELinear, Tensor] = {}
    leaders = [m for m in model.modules() if isinstance(m, LdMoleLinear) and m.groups[ADAPTER].linears[0] is m]
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0])) for m in leaders]
    call()
    for hook in hooks:
        hook.remove()
    given = []
    for leader, seen in inputs.items():
        group: InputGroup = leader.groups[ADAPTER]
        x = _leaf(seen)
        x_TD = x.detach().reshape(-1, x.shape[-1])
        with torch.no_grad():
            lam_T = _lambda_mlp(leader)(x_TD)
            routing = _route(group.linears, x_TD, lam_T)
            y = [m.base_layer(x) for m in group.linears]
        routing = Routing(_leaf(routing.p_TE), _leaf(routing.logits_TE), _leaf(lam_T))
        given.append(_Given(group.linears, x, _leaf(lam_T), routing, list(map(_leaf, y))))
    return given


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(torch.is_grad_enabled())


def _lambda_mlp(leader: MoELinear) -> LambdaMLP:
    found = leader.lambda_mlps[ADAPTER]
    assert found is not None  # sparsegen is what is measured
    return found


def _route(linears: list[MoELinear], x_TD: Tensor, lam_T: Tensor) -> Routing:
    routers: list[Any] = [linear.router[ADAPTER] for linear in linears]
    logits_GTE = torch.stack([router(x_TD) for router in routers])
    return routers[0].weigh(logits_GTE, lam_T, routers[0].decide(logits_GTE, lam_T))


class _Parts:
    """The adapter's parts, each over all input groups of the model; what they return goes into their backward."""

    def __init__(self, given: list[_Given], context: StepContext) -> None:
        self.given, self.context = given, context

    def leaves(self) -> Iterator[Tensor]:
        for g in self.given:
            yield from (g.x, g.lam_T, *g.y)
            yield from (tensor for tensor in g.routing if tensor is not None)

    def lambdas(self) -> list[Tensor]:
        return [_lambda_mlp(g.linears[0])(g.x_TD) for g in self.given]

    def routers(self) -> list[Tensor]:
        return [_route(g.linears, g.x_TD, g.lam_T).p_TE for g in self.given]

    def experts(self) -> list[Tensor]:
        outputs = []
        for g in self.given:
            leader, x_TD = g.linears[0], g.x_TD
            banks = [ExpertBank(m.lora_A[ADAPTER], m.lora_B[ADAPTER], m.scaling[ADAPTER]) for m in g.linears]
            decision = leader.dispatch.decide((g.routing.p_TE != 0).unbind(), banks, leader.name)
            outputs += leader.dispatch.start(x_TD, g.routing.by_linear(), banks, decision)()
        return outputs

    def rest(self) -> list[Tensor]:
        """Dropout, auxiliary losses and statistics of training, the sum with the frozen output."""
        outputs = []
        self.context.begin(None)
        for g in self.given:
            leader = g.linears[0]
            outputs.append(leader.lora_dropout[ADAPTER](g.x))
            if leader.training:
                router: Any = leader.router[ADAPTER]
                self.context.record_routing([m.name for m in g.linears], g.routing, g.x.shape[:-1], router.losses)
            outputs += [y + y.detach() for y in g.y]
        self.context.end()
        loss = self.context.auxiliary_loss()
        return [*outputs, loss] if isinstance(loss, Tensor) else outputs


def print_table(results: Sequence[Latency], settings: Settings | None = None) -> None:
    """Print what `bench_latency` returned."""
    s = settings or Settings()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one core of the CPU (CPU time)"
    print(f"E={s.experts}, r={s.rank}, lambda-MLP of {s.hidden}, all seven linears; {results[0].dtype} on {where},")
    print(
        f"torch {torch.__version__}; training: forward + backward of sequences of {SEQ} tokens; generation: one token"
    )
    print(f"after {SEQ} in the cache; shares of the whole; remainder: what the parts, measured alone, do not explain")
    columns = (*PARTS, "remainder")
    for shape, phase in dict.fromkeys((r.shape, r.phase) for r in results):
        print(f"\n{shape}, {phase}")
        print(f"{'batch':>7} {'whole ms':>9} " + " ".join(f"{name:>9}" for name in columns))
        for result in (r for r in results if (r.shape, r.phase) == (shape, phase)):
            shares = " ".join(f"{share:{max(9, len(name))}.1%}" for name, share in result.shares().items())
            print(f"{result.batch:7} {1e3 * result.whole:9.2f} {shares}")
