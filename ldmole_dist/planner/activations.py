"""What a forward keeps for its backward, traced on the meta device with the real model, and what the two hold beyond it.

Two models of one and two decoder layers are traced; a deeper one keeps as much more as the second layer added. The experts
are left out of the trace and added in closed form (`experts.kept`), because how many rows they get depends on the routing.

Shapes: T tokens, D in-features, O out-features, L experts held here, R LoRA rank, B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldmole_dist.loss import answer_loss
from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.layer import Finish
from ldmole_dist.method.routers import Routing
from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.planner.layers import last_layer
from ldmole_dist.planner.live import LiveBytes
from ldmole_dist.planner.shapes import meta_model
from ldmole_dist.planner.workload import Workload
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of


class Activations(NamedTuple):
    """Bytes, experts left out.

    Args:
        kept: from the forward to the backward.
        layer: of it, what one decoder layer adds; under checkpointing little more than its input.
        loss: held beyond `kept` while logits and loss are computed and differentiated.
        working: held beyond `kept` at the most in the backward of a decoder layer, its recomputation included.
    """

    kept: int
    layer: int
    loss: int
    working: int


def activations(workload: Workload, checkpointing: bool, partitioned: bool = False) -> Activations:
    """Of one micro-batch.

    Args:
        workload: backbone, adapter and shapes.
        checkpointing: whether decoder layers are recomputed.
        partitioned: whether DeepSpeed's linear for ZeRO-3 computes the frozen ones; it keeps their inputs.
    """
    # Without what makes no difference to a trace, so that nothing is traced twice.
    w = replace(workload, rank=1, accumulation=1, active=1.0, answer_tokens=workload.answer_tokens or workload.seq)
    one, two = (_trace(w, layers, checkpointing, partitioned) for layers in (1, 2))
    layer = two.kept - one.kept
    return Activations(one.kept + layer * (workload.backbone.num_hidden_layers - 1), layer, two.loss, two.working)


class _Traced(NamedTuple):
    kept: int
    loss: int
    working: int


@lru_cache(maxsize=64)
def _trace(workload: Workload, layers: int, checkpointing: bool, partitioned: bool) -> _Traced:
    model = traced_model(workload, layers, checkpointing, partitioned)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    live = LiveBytes()
    reached: dict[str, int] = {}
    last_layer(model).register_forward_hook(lambda *args: _at_backward(args[-1], live, reached))
    with on_meta(partitioned), live:
        before = live.now
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = run_forward(model, workload)
        kept = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        loss.backward()
        assert "loss" in reached, "the backward never came to the last decoder layer"
        return _Traced(kept, max(reached["loss"] - before - kept, 0), max(live.peak - before - kept, 0))


def traced_model(workload: Workload, layers: int, checkpointing: bool, partitioned: bool = False) -> PeftModel:
    """On the meta device, without what the experts compute."""
    model = meta_model(workload, layers)
    for module in model.modules():
        if isinstance(module, LdMoleLinear):
            module.dispatch = _WithoutExperts()
    if checkpointing:
        _recompute_on_meta(tuner_of(model).context, partitioned)
        enable_gradient_checkpointing(model)
    return model


@contextmanager
def on_meta(partitioned: bool = False) -> Iterator[None]:
    """Within it a model on the meta device can be trained."""
    with torch.device("meta"), _OnMeta(partitioned):
        yield


def run_forward(model: PeftModel, workload: Workload) -> Tensor:
    """The loss of a micro-batch, as the trainer computes it; within `on_meta`."""
    w = workload
    shape, answers = (w.micro_batch, w.seq), w.answer_tokens or w.seq
    output = model(
        input_ids=torch.zeros(shape, dtype=torch.long),
        attention_mask=torch.ones(shape, dtype=torch.long) if w.padded else None,
        use_cache=False,
        logits_to_keep=torch.arange(w.seq - answers, w.seq),
    )
    targets = torch.zeros(w.micro_batch, answers, dtype=torch.long)
    return answer_loss(output.logits, targets) + tuner_of(model).context.auxiliary_loss()


def _recompute_on_meta(context: Any, partitioned: bool) -> None:
    """The backward leaves the modes that it is called in: the recomputations in it enter them again."""
    contexts = context.checkpoint_contexts

    @contextmanager
    def again(region: AbstractContextManager[None]) -> Iterator[None]:
        with region, on_meta(partitioned):
            yield

    def both() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        first, recomputation = contexts()
        return first, again(recomputation)

    context.checkpoint_contexts = both


def _at_backward(output: Any, live: LiveBytes, reached: dict[str, int]) -> None:
    """When the gradient of the last decoder layer arrives, the loss is behind us."""
    hidden = output[0] if isinstance(output, tuple) else output

    def mark(gradient: Tensor) -> None:
        if "loss" not in reached:
            reached["loss"], live.peak = live.peak, live.now

    hidden.register_hook(mark)


class _OnMeta(TorchFunctionMode):
    """Stands in for what a device would do: its attention kernel, values of tensors, and DeepSpeed's linear."""

    def __init__(self, partitioned: bool) -> None:
        super().__init__()
        self.partitioned = partitioned

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _flash(*args, **kwargs)
        if function is Tensor.__bool__ and args[0].device.type == "meta":
            return False  # asked of masks: are all tokens real?
        if function is Tensor.__getitem__ and _is_mask(args[1]):
            return args[0][torch.arange(len(args[0]))]  # every position has an answer
        if function is F.linear and self.partitioned:
            return _KeepsInput.apply(*args, **kwargs)
        return function(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.device.type == "meta"


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A fused attention: keeps query, key, value, output, a log-sum-exp for each position and head, and the mask."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # torch turns it into numbers to add
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _KeepsInput(torch.autograd.Function):
    """DeepSpeed's LinearFunctionForZeroStage3 saves the input even where the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.matmul(ctx.saved_tensors[1]), None, None


class _WithoutExperts:
    """A dispatch whose outputs cost nothing and keep nothing."""

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> None:
        """Nothing moves."""

    def start(
        self, x_TD: Tensor, routings: Sequence[Routing], banks: Sequence[ExpertBank], plan: None, repeated: bool = False
    ) -> Finish:
        """See `Dispatch`."""
        return lambda: [_Nothing.apply(x_TD, r.p_TE, b.A_LRD, b.B_LOR) for r, b in zip(routings, banks, strict=True)]


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.shapes = [(t.shape, t.dtype) for t in (x, p, A, B)]
        return x.new_empty(x.shape[0], B.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.shapes)
