"""Every quantity of one adapted linear against the outputs of the authors' own code (float32).

`golden/` holds inputs, weights, outputs and gradients; the stored gradients are of
(y * dy).sum() + 0.7 * load_balance + 0.3 * sparsity, the authors' sparsity averaging padding in.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldmole_dist.method.context import LossWeights, StepContext
from ldmole_dist.method.experts import ExpertBank, fused_experts, sparse_experts
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.layer import Finish, LocalDispatch, MoELinear
from ldmole_dist.method.losses import load_balance_loss, sparsity_loss
from ldmole_dist.method.routers import Routing, SparsegenRouter

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}, file.metadata()


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value.detach() - reference).norm() / reference.norm().clamp_min(1e-30))


def build(g: dict[str, Tensor], meta: dict[str, str]) -> tuple[MoELinear, StepContext]:
    (E, _, D), O = g["A"].shape, g["B"].shape[1]
    context = StepContext()
    base = nn.Linear(D, O, bias=False).requires_grad_(False)
    base.weight.data.copy_(g["w_base"])
    router, mlp = SparsegenRouter(D, E), LambdaMLP(D, int(meta["mlp_hidden"]), float(meta["eps"]))
    with torch.no_grad():
        router.weight.copy_(g["w_gate"])
        for parameter, name in [
            (mlp.fc1.weight, "w1"),
            (mlp.fc1.bias, "b1"),
            (mlp.fc2.weight, "w2"),
            (mlp.fc2.bias, "b2"),
        ]:
            parameter.copy_(g[f"mlp_{name}"])
    bank = ExpertBank(nn.Parameter(g["A"]), nn.Parameter(g["B"]), float(meta["alpha"]) / float(meta["rank"]))
    layer = MoELinear(base, "linear", context, LocalDispatch())
    layer.add_adapter("default", bank, router, mlp, dropout=0.0)
    return layer, context


class FixedFormulation(LocalDispatch):
    """LocalDispatch with a fixed formulation."""

    def __init__(self, formulation: str) -> None:
        self.formulation = formulation

    def start(self, x_TD: Tensor, routings, banks, decision, repeated: bool = False) -> Finish:
        (routing,), (bank,) = routings, banks
        if self.formulation == "fused":
            return lambda: [fused_experts(x_TD, routing.p_TE, bank)]
        return lambda: [sparse_experts(x_TD, routing.p_TE, bank, (routing.p_TE != 0).sum(0).tolist())]


def test_golden_files_exist() -> None:
    assert len(FILES) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("formulation", ["fused", "sparse"])
def test_equal_to_golden(path: Path, formulation: str) -> None:
    g, meta = load(path)
    layer, context = build(g, meta)
    layer.dispatch = FixedFormulation(formulation)
    seen: list[Routing] = []
    record_routing = context.record_routing
    context.record_routing = lambda names, routing, *rest: (
        seen.extend(routing.by_linear()),
        record_routing(names, routing, *rest),
    )[1]
    mask = g["attention_mask"]
    x = g["x"].clone().requires_grad_()

    context.begin(mask)
    y = layer.forward_with_adapter(x, "default")
    (routing,) = seen
    E = g["A"].shape[0]
    balance = load_balance_loss(routing.p_TE, mask.flatten())
    sparsity = sparsity_loss(
        routing.logits_TE, routing.lam_T, int(meta["k_target"])
    )  # no mask: the authors average padding in
    loss = (y * g["dy"]).sum() + float(meta["lb_coef"]) * balance + float(meta["sparsity_coef"]) * sparsity
    loss.backward()

    assert distance(routing.logits_TE, g["gate_score"].view(-1, E)) < 1e-5
    assert distance(routing.lam_T, g["lam"].flatten()) < 1e-5
    assert distance(routing.p_TE, g["p"].view(-1, E)) < 1e-5
    assert torch.equal(routing.p_TE != 0, g["p"].view(-1, E) != 0)
    assert distance(y, g["y"]) < 1e-5
    assert distance(balance, g["load_balance"]) < 1e-5
    assert distance(context.terms["balance"][0], g["load_balance"]) < 1e-5
    assert abs(float(sparsity - g["sparsity"])) < 1e-5 * max(1.0, float(g["sparsity"]))
    mlp = layer.lambda_mlps["default"]
    gradients = {
        "x": x.grad,
        "A": layer.ldmole_adapters["default"].lora_A.grad,
        "B": layer.ldmole_adapters["default"].lora_B.grad,
        "w_gate": layer.ldmole_adapters["default"].router.weight.grad,
        "mlp_w1": mlp.fc1.weight.grad,
        "mlp_b1": mlp.fc1.bias.grad,
        "mlp_w2": mlp.fc2.weight.grad,
        "mlp_b2": mlp.fc2.bias.grad,
    }
    for name, gradient in gradients.items():
        assert gradient is not None and distance(gradient, g[f"grad_{name}"]) < 1e-5, name


def test_sparsity_loss_masks_padding() -> None:
    g, meta = load(FILES[0])
    layer, context = build(g, meta)
    context.weights = LossWeights(target_k=int(meta["k_target"]))
    context.begin(g["attention_mask"])
    layer.forward_with_adapter(g["x"], "default")
    (masked,) = context.terms["sparsity"]
    real = g["attention_mask"].flatten().bool()
    by_hand = sparsity_loss(g["gate_score"].flatten(0, 1)[real], g["lam"].flatten()[real], int(meta["k_target"]))
    torch.testing.assert_close(masked, by_hand)
    assert not torch.isclose(masked, g["sparsity"])  # the authors average padding in
