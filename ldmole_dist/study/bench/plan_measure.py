"""Measure what a real engine holds and sends in one optimizer step, for `ldmole bench plan`.

It is independent of the planner. Bytes are those of distinct storages that module, engine and optimizer hold; elements are the
payloads of all collectives of torch.distributed, whether from DeepSpeed or from this package.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.engine.training_state import held_gradients, held_optimizer_state, held_parameters, tensors_in
from ldmole_dist.loss import answer_loss, next_tokens
from ldmole_dist.method.context import Tape
from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.study.random_model import engine_for, random_model
from ldmole_dist.tuner.model import tuner_of

WARM_UP = 3  # optimizer steps; ZeRO-3 records the order of its all-gathers in the second micro-batch


@dataclass
class Measured:
    """What one rank holds, and what it sends in one optimizer step.

    Attributes:
        bytes: by part.
        wire: elements that the dispatch sends, by kind.
        wire_bytes: bytes that the dispatch sends, by kind.
        supports: (T, E) bool of every linear and micro-batch, in the order of the forwards.
        collectives: elements, by operation and number of ranks.
        calls: calls, by operation and number of ranks.
        active: mean number of active experts of a token.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    wire: Counter[str] = field(default_factory=Counter)
    wire_bytes: Counter[str] = field(default_factory=Counter)
    supports: list[np.ndarray] = field(default_factory=list)
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    active: float = 0.0


class Collectives(TorchDispatchMode):
    """Counts the calls of every collective, and their elements: those of the largest tensor of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = str(function).split(".")[1].strip("_")
            group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
            size = 0 if group is None else dist.ProcessGroup.unbox(group).size()
            self.elements[name, size] += max((t.numel() for t in tensors), default=0)
            self.calls[name, size] += 1
        return function(*args, **(kwargs or {}))


def measure(workload: Workload, strategy: Strategy, dense: bool) -> Measured:
    """Measure one optimizer step of a real engine on this rank, after a warm-up; every rank calls it.

    Args:
        workload: a workload with a small backbone.
        strategy: a strategy for as many ranks as the process group has.
        dense: whether to make every token use all experts.
    """
    w, s, process = workload, strategy, start()
    parallel = expert_parallel(s.ep_size, s.dispatch)
    adapter = dict(
        num_experts=w.num_experts,
        r=w.lora_rank,
        lambda_hidden=w.lambda_hidden,
        lora_dropout=w.dropout,
        target_modules=list(w.target_modules),
    )
    model = random_model(w.backbone, adapter, process.device, w.precision, parallel, s.stage)
    tuner = tuner_of(model)
    if dense:
        with torch.no_grad():
            for name, parameter in tuner.lambda_mlp.named_parameters():
                if name.endswith("fc2.bias"):
                    parameter.fill_(-1e4)  # lambda near minus infinity activates every expert
    kept = KeptForBackward(model)
    if s.checkpointing:
        enable_gradient_checkpointing(model)
    engine = engine_for(model, s.deepspeed, w.micro_batch, w.accumulation, w.precision, s.ep_size, s.zero)
    for step in range(WARM_UP):
        for index in range(w.accumulation):
            engine.backward(_loss(engine, w, _batch(w, process.device, step, index)))
            engine.step()
    measured = Measured()
    measured.bytes["parameters"] = size_of(held_parameters(engine))
    wire, collectives, context = engine.parallel.wire, Collectives(), tuner_of(engine.module).context
    wire.clear()
    context.observer = lambda name, routing, mask_T: measured.supports.append((routing.p_TE != 0).cpu().numpy())
    with collectives:
        for index in range(w.accumulation):
            batch = _batch(w, process.device, WARM_UP, index)
            with kept.recording():
                loss = _loss(engine, w, batch)
            measured.bytes["activations"] = kept.size()
            engine.backward(loss)
            measured.bytes["gradients"] = max(measured.bytes.get("gradients", 0), size_of(held_gradients(engine)))
            engine.step()
    measured.bytes["optimizer"] = size_of(held_optimizer_state(engine))
    measured.wire = wire.by_kind()
    for (_, kind), number in wire.bytes.items():
        measured.wire_bytes[kind] += number
    measured.collectives, measured.calls = collectives.elements, collectives.calls
    stats = torch.stack(list(context.stats.values()))
    measured.active = float(stats[:, 0].sum() / (len(stats) * w.tokens))
    return measured


def _batch(workload: Workload, device: torch.device, step: int, index: int) -> dict[str, Tensor]:
    """Draw full sequences; a workload with padding has one padding token, so that attention needs its mask."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * index + dist.get_rank())
    shape = workload.micro_batch, workload.seq
    ids = torch.randint(0, workload.backbone.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    if workload.padded:
        mask[0, 0] = 0
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device))


def _loss(engine: Engine, workload: Workload, batch: dict[str, Tensor]) -> Tensor:
    """Return the trainer's loss over the last positions of every sequence."""
    answers = workload.answer_tokens or workload.seq
    positions = torch.arange(workload.seq - answers, workload.seq, device=batch["input_ids"].device)
    inputs: dict[str, Any] = batch | {"use_cache": False, "logits_to_keep": positions}
    logits = engine(**inputs).logits
    targets = next_tokens(batch["input_ids"])[:, positions]
    return answer_loss(logits, targets) / targets.numel() + tuner_of(engine.module).context.auxiliary_loss()


class KeptForBackward:
    """Memory that a forward keeps for its backward: saved tensors except parameters, and tapes of recomputed layers.

    Args:
        module: the model, before gradient checkpointing is enabled on it.
    """

    def __init__(self, module: PeftModel) -> None:
        self._module = module
        self._saved: dict[int, Any] = {}
        self._tapes: list[Tape] = []
        context: Any = tuner_of(module).context
        checkpoint_contexts = context.checkpoint_contexts

        def recorded() -> Any:
            forward, recomputation = checkpoint_contexts()
            self._tapes.append(forward.tape)
            return forward, recomputation

        context.checkpoint_contexts = recorded

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward inside the block, and forget the previous one."""
        self._saved.clear()
        self._tapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Look up the storages at each call, because ZeRO-3 gathers a parameter into another storage each time.
        if all(storage._cdata != p.untyped_storage()._cdata for p in self._module.parameters()):
            self._saved[storage._cdata] = storage
        return tensor

    def size(self) -> int:
        """Return the bytes that the last forward kept."""
        return size_of([*self._saved.values(), *tensors_in(self._tapes)])


def size_of(tensors: Iterable[Any]) -> int:
    """Return the bytes of the distinct storages of tensors and storages."""
    storages = (t.untyped_storage() if isinstance(t, Tensor) else t for t in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
