"""What a real engine holds and sends in a training step, counted without the planner: `ldmole bench plan`.

Bytes are those of distinct storages, found by walking what module, engine and optimizer hold. Elements are the payloads of
the collectives that torch.distributed is asked for, whoever asks.

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
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from ldmole_dist.config import Optimisation
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import load_ds_config, resolve_ds_config
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.partitioned import partitioned_loading
from ldmole_dist.engine.startup import start
from ldmole_dist.engine.training_state import held_gradients, held_optimizer_state, held_parameters, tensors_in
from ldmole_dist.loss import answer_loss, next_tokens
from ldmole_dist.method.context import LossWeights, Tape
from ldmole_dist.model.backbone import DTYPES, enable_gradient_checkpointing
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import spread_experts, tuner_of

WARM_UP = 3  # optimizer steps: ZeRO-3 records what it gathers in the second micro-batch


@dataclass
class Measured:
    """Of one rank: bytes by part, elements of an optimizer step by kind, and the calls that carried those of DeepSpeed."""

    bytes: dict[str, int] = field(default_factory=dict)
    wire: Counter[str] = field(default_factory=Counter)
    wire_bytes: Counter[str] = field(default_factory=Counter)
    # (T, E) bool of every linear and micro-batch, in the order of the forwards
    supports: list[np.ndarray] = field(default_factory=list)
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)  # by (operation, ranks)
    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    active: float = 0.0


class Collectives(TorchDispatchMode):
    """Counts the elements of every collective: of the tensor reduced, of the tensor gathered, of the tensor scattered."""

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
    """One optimizer step of a real engine on this rank, after a warm-up; every rank calls it.

    Args:
        workload: of a small backbone.
        strategy: whose number of ranks is that of the process group.
        dense: whether every token is made to use all experts.
    """
    process = start()
    model = _model(workload, strategy, dense, process.device)
    kept = Kept(model)
    if strategy.checkpointing:
        enable_gradient_checkpointing(model)
    engine = _engine(model, workload, strategy)
    context = tuner_of(engine.module).context
    for step in range(WARM_UP):
        for turn in range(workload.accumulation):
            engine.backward(_loss(engine, workload, _batch(workload, process.device, step, turn)))
            engine.step()
    measured = Measured()
    measured.bytes["parameters"] = size_of(held_parameters(engine))
    engine.parallel.wire.clear()
    counted = Collectives()
    context.observer = lambda name, routing, mask_T: measured.supports.append((routing.p_TE != 0).cpu().numpy())
    with counted:
        for turn in range(workload.accumulation):
            batch = _batch(workload, process.device, WARM_UP, turn)
            with kept.watching():
                loss = _loss(engine, workload, batch)
            measured.bytes["activations"] = kept.size()
            engine.backward(loss)
            measured.bytes["gradients"] = max(measured.bytes.get("gradients", 0), size_of(held_gradients(engine)))
            engine.step()
    measured.bytes["optimizer"] = size_of(held_optimizer_state(engine))
    wire = engine.parallel.wire
    measured.wire = wire.by_kind()
    for (_, kind), number in wire.bytes.items():
        measured.wire_bytes[kind] += number
    measured.collectives, measured.calls = counted.elements, counted.calls
    stats = torch.stack(list(context.stats.values()))
    measured.active = float(stats[:, 0].sum() / (len(stats) * workload.tokens))
    return measured


def _model(workload: Workload, strategy: Strategy, dense: bool, device: torch.device) -> PeftModel:
    w, s = workload, strategy
    torch.manual_seed(3)
    with partitioned_loading(s.stage, w.precision):
        backbone = AutoModelForCausalLM.from_config(w.backbone, dtype=DTYPES[w.precision])
    if s.stage < 3:
        torch.nn.Module.to(backbone, device)
    parallel = expert_parallel(s.ep_size, s.dispatch)
    spread_experts(backbone, parallel)
    adapter = LdMoleConfig(
        num_experts=w.num_experts,
        r=w.lora_rank,
        lambda_hidden=w.lambda_hidden,
        lora_dropout=w.dropout,
        target_modules=list(w.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(backbone, adapter)
    tuner = tuner_of(model)
    tuner.context.weights = LossWeights(balance=1.0)
    if dense:
        with torch.no_grad():
            for name, parameter in tuner.lambda_mlp.named_parameters():
                if name.endswith("fc2.bias"):
                    parameter.fill_(-1e4)  # lambda goes to -inf: every expert is active
    return model.train()


def _engine(model: PeftModel, workload: Workload, strategy: Strategy) -> Engine:
    w, s = workload, strategy
    settings = load_ds_config(s.deepspeed)
    settings["zero_optimization"].update(dict(s.zero))
    ds_config = resolve_ds_config(
        settings,
        micro_batch_size=w.micro_batch,
        accumulation=w.accumulation,
        max_grad_norm=1.0,
        precision=w.precision,
        ep_size=s.ep_size,
    )
    return Engine(model, ds_config, Optimisation(schedule="constant"))


def _batch(workload: Workload, device: torch.device, step: int, turn: int) -> dict[str, Tensor]:
    """Full sequences, but for one padding token where there is to be padding; answers at the end of each."""
    w = workload
    generator = torch.Generator().manual_seed(1000 * step + 100 * turn + dist.get_rank())
    ids = torch.randint(0, w.backbone.vocab_size, (w.micro_batch, w.seq), generator=generator)
    mask = torch.ones_like(ids)
    if w.padded:
        mask[0, 0] = 0
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device))


def _loss(engine: Engine, workload: Workload, batch: dict[str, Tensor]) -> Tensor:
    """As the trainer's, over the last positions of every sequence."""
    answers = workload.answer_tokens or workload.seq
    positions = torch.arange(workload.seq - answers, workload.seq, device=batch["input_ids"].device)
    inputs: dict[str, Any] = batch | {"use_cache": False, "logits_to_keep": positions}
    logits = engine(**inputs).logits
    targets = next_tokens(batch["input_ids"])[:, positions]
    return answer_loss(logits, targets) / targets.numel() + tuner_of(engine.module).context.auxiliary_loss()


class Kept:
    """What a forward keeps for its backward: saved tensors without parameters, and the tapes of checkpointed regions.

    Args:
        module: to watch; before checkpointing is enabled on it.
    """

    def __init__(self, module: PeftModel) -> None:
        self._module = module
        self._saved: dict[int, Any] = {}
        self._tapes: list[Tape] = []
        context: Any = tuner_of(module).context
        contexts = context.checkpoint_contexts

        def watched() -> Any:
            first, again = contexts()
            self._tapes.append(first.tape)
            return first, again

        context.checkpoint_contexts = watched

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward; forgets the one before."""
        self._saved.clear()
        self._tapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Looked up anew each time: under ZeRO-3 a parameter is another storage each time it is gathered.
        if all(storage._cdata != p.untyped_storage()._cdata for p in self._module.parameters()):
            self._saved[storage._cdata] = storage
        return tensor

    def size(self) -> int:
        """Bytes of distinct storages."""
        return size_of([*self._saved.values(), *tensors_in(self._tapes)])


def size_of(things: Iterable[Any]) -> int:
    """Bytes of distinct storages."""
    storages = {}
    for thing in things:
        storage = thing.untyped_storage() if isinstance(thing, Tensor) else thing
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
