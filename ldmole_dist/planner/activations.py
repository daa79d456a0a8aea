"""Activation memory of forward and backward, traced with the real model on the meta device.

Models with one and two decoder layers are traced; each further layer is assumed to keep as many bytes for the backward as the
second layer. The trace leaves out the experts, because their number of rows depends on the routing; `expert_costs.saved_bytes`
adds them in closed form.

Shapes: T tokens, D in-features, O out-features, E experts, L local experts, R LoRA rank.
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
    """Activation memory in bytes, without the experts.

    Args:
        kept: Bytes kept from the forward to the backward.
        loss: Peak above `kept` in the forward, and in the backward of the loss and the output head.
        working: Peak above `kept` in the backward of the decoder layers, including their recomputation.
    """

    kept: int
    loss: int
    working: int


def activations(workload: Workload, checkpointing: bool, partitioned: bool = False) -> Activations:
    """Return the activation memory of one micro-batch.

    Args:
        workload: Backbone, adapter and shapes.
        checkpointing: Whether decoder layers are recomputed in the backward.
        partitioned: Whether linears use DeepSpeed's ZeRO-3 linear, which saves its input even if its weight is frozen.
    """
    # Workloads whose traces are equal get equal fields, to hit the cache.
    w = replace(workload, lora_rank=1, accumulation=1, active=1.0, answer_tokens=workload.answer_tokens or workload.seq)
    one, two = (_trace(w, layers, checkpointing, partitioned) for layers in (1, 2))
    further = workload.backbone.num_hidden_layers - 1
    return two._replace(kept=one.kept + (two.kept - one.kept) * further)


@lru_cache(maxsize=64)
def _trace(workload: Workload, layers: int, checkpointing: bool, partitioned: bool) -> Activations:
    """Return the activation memory of a model with `layers` decoder layers, traced in a forward and backward."""
    model = traced_model(workload, layers, checkpointing, partitioned)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    live = LiveBytes()
    loss_peaks: list[int] = []

    def end_of_loss(module: Any, args: Any, output: Any) -> None:
        """Register a gradient hook on the layer's output. The hook's first call follows the backward of loss and head."""

        def record(gradient: Tensor) -> None:
            if not loss_peaks:
                loss_peaks.append(live.peak)
                live.peak = live.now

        (output[0] if isinstance(output, tuple) else output).register_hook(record)

    last_layer(model).register_forward_hook(end_of_loss)
    with on_meta(partitioned), live:
        start = live.now
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = run_forward(model, workload)
        kept = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        loss.backward()
    assert loss_peaks, "the backward did not reach the last decoder layer"
    return Activations(kept, max(loss_peaks[0] - start - kept, 0), max(live.peak - start - kept, 0))


def traced_model(workload: Workload, layers: int, checkpointing: bool, partitioned: bool = False) -> PeftModel:
    """Return the adapted model on the meta device; its experts return uninitialized outputs and save nothing for the backward.

    Args:
        workload: Backbone, adapter and shapes.
        layers: Number of decoder layers.
        checkpointing: Whether decoder layers are recomputed in the backward.
        partitioned: Whether linears save their input in a recomputation; unused without checkpointing. See `on_meta`.
    """
    model = meta_model(workload, layers)
    for module in model.modules():
        if isinstance(module, LdMoleLinear):
            module.dispatch = _NoExperts()
    if checkpointing:
        _recompute_on_meta(tuner_of(model).context, partitioned)
        enable_gradient_checkpointing(model)
    return model


@contextmanager
def on_meta(partitioned: bool = False) -> Iterator[None]:
    """Context manager in which a model on the meta device can run its forward and backward.

    Args:
        partitioned: Whether linears save their input, as DeepSpeed's ZeRO-3 linear does.
    """
    with torch.device("meta"), _OnMeta(partitioned):
        yield


def run_forward(model: PeftModel, workload: Workload) -> Tensor:
    """Return the sum of the answer losses and the auxiliary losses of a micro-batch; call within `on_meta`.

    Unlike the trainer, this does not divide the answer losses by the number of answers.
    """
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
    """Make recomputations enter `on_meta`, because autograd runs them outside of the modes that surround `backward()`."""
    contexts = context.checkpoint_contexts

    @contextmanager
    def on_meta_too(region: AbstractContextManager[None]) -> Iterator[None]:
        with region, on_meta(partitioned):
            yield

    def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        forward, recomputation = contexts()
        return forward, on_meta_too(recomputation)

    context.checkpoint_contexts = checkpoint_contexts


class _OnMeta(TorchFunctionMode):
    """Function mode for the meta device, in which the memory of a forward is that of a GPU.

    Attention is computed as fused attention, because torch would choose the math formulation on the meta device, and the math
    formulation needs more memory. Functions that read values (`bool`, a mask as index) get an assumed result. If
    `partitioned`, `F.linear` saves its input.
    """

    def __init__(self, partitioned: bool) -> None:
        super().__init__()
        self.partitioned = partitioned

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _flash(*args, **kwargs)
        if function is Tensor.__bool__ and args[0].device.type == "meta":
            return False  # transformers checks whether all positions are unmasked; assume that some are masked
        if function is Tensor.__getitem__ and _is_mask(args[1]):
            return args[0][torch.arange(len(args[0]))]  # meta masks have no values; assume all True
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
    """Compute fused attention, which saves query, key, value, output, mask, and a log-sum-exp per position and head."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # SDPA also converts a boolean mask to an additive one.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _KeepsInput(torch.autograd.Function):
    """Linear that saves its input even if its weight is frozen, like DeepSpeed's LinearFunctionForZeroStage3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.matmul(ctx.saved_tensors[1]), None, None


class _NoExperts:
    """Dispatch (`method.layer.Dispatch`) that returns uninitialized outputs of the correct shape."""

    def decide(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> None:
        """Return None: no expert-parallel dispatch takes place."""

    def start(
        self,
        x_TD: Tensor,
        routings: Sequence[Routing],
        banks: Sequence[ExpertBank],
        decision: None,
        repeated: bool = False,
    ) -> Finish:
        """Return a function that returns an uninitialized output for each linear."""
        return lambda: [_Empty.apply(x_TD, r.p_TE, b.A_LRD, b.B_LOR) for r, b in zip(routings, banks, strict=True)]


class _Empty(torch.autograd.Function):
    """Output and gradients of the experts with the correct shapes and uninitialized values; saves nothing for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.shapes = [(t.shape, t.dtype) for t in (x, p, A, B)]
        return x.new_empty(x.shape[0], B.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.shapes)
