"""Mixed precision by `torch.autocast`: compared with plain operations under the same autocast, and with float64."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmole_dist.method.context import LossWeights
from ldmole_dist.method.routers import Routing
from ldmole_dist.selftest.tiny import micro_batch
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of
from tests.small_adapter import CPU, adapt, move

HALF = [torch.bfloat16, torch.float16]
BATCH = micro_batch(0, CPU)


def gradients(model: Any, dtype: torch.dtype | None, backward_inside: bool = False) -> dict[str, Tensor]:
    """Gradients of the task loss and all auxiliary losses, under autocast to `dtype` unless it is None."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(**BATCH).loss.float() + tuner_of(model).context.auxiliary_loss()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((one[n].double() - other[n].double()).norm() / other[n].double().norm()) for n in other}


def model_with(router: str, weights: torch.dtype = torch.float32) -> Any:
    model = move(adapt(dtype=weights, router=router)).train()
    tuner_of(model).context.weights = LossWeights(balance=0.5, z=0.1)
    return model


def plain_forward(self: LdMoleLinear, x: Tensor, adapter: str) -> Tensor:
    """`forward_with_adapter` for the router "softmax", in operations whose dtypes autocast chooses, without its losses."""
    x_TD = x.reshape(-1, x.shape[-1])
    with torch.autocast("cpu", enabled=False):
        scores = x_TD.to(torch.get_autocast_dtype("cpu")).float() @ self.ldmole_adapters[adapter].router.weight.t()
        p_TE = scores.softmax(-1)
        self.context.record_routing(
            [self.name],
            Routing(p_TE[None], scores[None], None),
            self.context.token_mask(self.mask_name, x.shape[:-1]),
            ("balance", "z"),
        )
    experts = zip(
        p_TE.unbind(1), self.ldmole_adapters[adapter].lora_A, self.ldmole_adapters[adapter].lora_B, strict=True
    )
    delta = sum(p_T.unsqueeze(1) * F.linear(F.linear(x_TD, A), B) for p_T, A, B in experts)
    y = self.base_layer(x)
    return y + (self.ldmole_adapters[adapter].scaling * delta).view(y.shape).to(y.dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_as_exact_as_those_of_plain_operations(dtype: torch.dtype) -> None:
    exact = gradients(model_with("softmax").double(), None)
    ours = distance(gradients(model_with("softmax"), dtype), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LdMoleLinear, "forward_with_adapter", plain_forward)
        plain = distance(gradients(model_with("softmax"), dtype), exact)
    assert max(plain.values()) < 0.2
    # How much one tensor is off is a matter of luck; the mean and the maximum are not.
    assert statistics.mean(ours.values()) < 1.1 * statistics.mean(plain.values())
    assert max(ours.values()) < 1.5 * max(plain.values())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", HALF)
def test_backward_within_autocast_is_the_same(dtype: torch.dtype, weights: torch.dtype) -> None:
    outside, inside = (gradients(model_with("sparsegen", weights), dtype, within) for within in (False, True))
    adapter = {name for name in outside if "lora" in name or "router" in name or "lambda" in name}
    assert len(adapter) == 7 * 2 * 3 + 2 * 4
    assert max(distance(inside, outside)[name] for name in adapter) < 1e-6


def test_checkpointing_under_autocast_gives_the_same_gradients() -> None:
    model = model_with("sparsegen")
    expected = gradients(model, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert max(distance(gradients(model, torch.bfloat16), expected).values()) < 1e-6


def test_routing_and_losses_are_float32_under_autocast() -> None:
    model, seen = model_with("sparsegen", torch.bfloat16), []

    def observe(name: str, routing: Routing, mask_T: Tensor | None) -> None:
        assert routing.lam_T is not None
        seen.extend(tensor.dtype for tensor in (routing.p_TE, routing.logits_TE, routing.lam_T))

    context = tuner_of(model).context
    context.observer = observe
    with torch.autocast("cpu", torch.bfloat16):
        model(**BATCH)
        seen.append(context.auxiliary_loss().dtype)
    assert len(seen) == 7 * 2 * 3 + 1 and set(seen) == {torch.float32}


def test_fp16_trains_with_a_gradient_scaler() -> None:
    model = model_with("sparsegen")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**12), []
    for _ in range(8):
        with torch.autocast("cpu", torch.float16):
            loss = model(**BATCH).loss.float()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and scaler.get_scale() == 2.0**12
    assert all(not p.equal(before[name]) for name, p in model.named_parameters() if p.requires_grad)
