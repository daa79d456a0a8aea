"""Measure the memory and the communication of a real engine in one optimizer step, for `ldmole bench plan`.

The measurement does not use the planner's formulas. Memory is the bytes of the distinct storages that module, engine
and optimizer hold, and of those that a forward keeps for its backward. Communication is the calls and
elements of all torch.distributed collectives, whether DeepSpeed or this package calls them, and what the dispatch counts as
sent (`parallel.wire`).

Shapes: T tokens of a micro-batch, E experts.
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

# Optimizer steps before the measured one, because ZeRO-3 records the order of the modules in the first micro-batch and
# prefetches from the second one.
WARM_UP = 3


@dataclass
class Measured:
    """Memory and communication of one rank in one optimizer step.

    Attributes:
        bytes: "parameters", "gradients", "optimizer" or "activations" -> bytes. Gradients are the maximum over
            micro-batches, activations those of the last micro-batch.
        wire: kind (see `parallel.wire`) -> elements that the dispatch sends.
        wire_bytes: kind -> bytes that the dispatch sends.
        supports: (T, E) bool arrays, one per linear and micro-batch, in the order of the forwards.
        collectives: (torch operator, number of ranks) -> elements, as counted by `Collectives`.
        calls: (torch operator, number of ranks) -> number of calls.
        active: active experts per token, mean over tokens and linears in the last micro-batch. The token that `_batch` masks
            counts as a token without active experts.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    wire: Counter[str] = field(default_factory=Counter)
    wire_bytes: Counter[str] = field(default_factory=Counter)
    supports: list[np.ndarray] = field(default_factory=list)
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    active: float = 0.0


class Collectives(TorchDispatchMode):
    """Dispatch mode that counts the calls and the elements of each c10d operator and process-group size.

    The elements of a call are those of its largest tensor.
    """

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
    """Measure one optimizer step of a real engine on this rank, after `WARM_UP` steps.

    Collective: every rank must call it.

    Args:
        workload: workload to train.
        strategy: strategy to train with; its number of ranks must equal the world size.
        dense: whether to make all experts active for every token.
    """
    w, s, process = workload, strategy, start()
    parallel = expert_parallel(s.ep_size, s.dispatch)
    adapter: dict[str, Any] = dict(num_experts=w.num_experts, r=w.lora_rank, lambda_hidden=w.lambda_hidden)
    adapter |= dict(lora_dropout=w.dropout, target_modules=list(w.target_modules))
    model = random_model(w.backbone, adapter, process.device, w.precision, parallel, s.stage)
    tuner = tuner_of(model)
    if dense:
        with torch.no_grad():
            for name, parameter in tuner.ldmole_lambda_mlp.named_parameters():
                if name.endswith("fc2.bias"):
                    parameter.fill_(-1e4)  # a very negative lambda activates every expert
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
    """Draw random sequences, different ones on each rank.

    If `workload.padded`, mask one token, because attention drops a mask without padding.
    """
    generator = torch.Generator().manual_seed(1000 * step + 100 * index + dist.get_rank())
    shape = workload.micro_batch, workload.seq
    ids = torch.randint(0, workload.backbone.vocab_size, shape, generator=generator)
    mask = torch.ones_like(ids)
    if workload.padded:
        mask[0, 0] = 0
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device))


def _loss(engine: Engine, workload: Workload, batch: dict[str, Tensor]) -> Tensor:
    """Return a loss as in training: the cross entropy of next tokens, plus the auxiliary losses.

    The cross entropy is summed over the last `answer_tokens` positions of each sequence (all positions if None), of which the
    very last one has no next token, and divided by the number of these positions in all sequences.
    """
    answers = workload.answer_tokens or workload.seq
    positions = torch.arange(workload.seq - answers, workload.seq, device=batch["input_ids"].device)
    inputs: dict[str, Any] = batch | {"use_cache": False, "logits_to_keep": positions}
    logits = engine(**inputs).logits
    targets = next_tokens(batch["input_ids"])[:, positions]
    return answer_loss(logits, targets) / targets.numel() + tuner_of(engine.module).context.auxiliary_loss()


class KeptForBackward:
    """Records the tensors that a forward keeps for its backward.

    These are the tensors that autograd saves, without the parameters. With gradient checkpointing, they also include the
    tapes of routing decisions that the recomputation replays.

    Args:
        module: model to observe. Create this object before `enable_gradient_checkpointing`, which reads the
            `checkpoint_contexts` that this object replaces.
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
        """Record the forward that runs inside the block, and discard the previous record."""
        self._saved.clear()
        self._tapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Look up the parameters' storages at every call, because each all-gather of ZeRO-3 allocates a new one.
        if all(storage._cdata != p.untyped_storage()._cdata for p in self._module.parameters()):
            self._saved[storage._cdata] = storage
        return tensor

    def size(self) -> int:
        """Return the bytes of the distinct storages of the recorded tensors."""
        return size_of([*self._saved.values(), *tensors_in(self._tapes)])


def size_of(tensors: Iterable[Any]) -> int:
    """Return the total bytes of tensors and storages, counting each distinct storage once."""
    storages = (t.untyped_storage() if isinstance(t, Tensor) else t for t in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
