"""Dispatch over 4 ranks in each mode: equal to one process that holds all experts, with exact counts of elements sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.layer import LocalDispatch
from ldmole_dist.method.routers import Routing
from ldmole_dist.parallel.decision import GroupSizes, count_message_elements, payload_elements
from ldmole_dist.parallel.dispatch import Mode
from ldmole_dist.parallel.exchange import Payload, exchange
from ldmole_dist.parallel.placement import Placement
from ldmole_dist.parallel.wire import FORWARD, Tally, Wire
from ldmole_dist.selftest.local_ranks import LocalRanks

D, R = 6, 3


@dataclass(frozen=True)
class Scenario:
    """One input group: tokens of each rank, out-features of each linear, and which experts may be active."""

    ep_size: int
    tokens: tuple[int, int, int, int] = (7, 11, 4, 9)
    outs: tuple[int, ...] = (5,)
    experts: int = 8
    active: str = "random"
    dtype: torch.dtype = torch.float64
    input_gradient: bool = True


SCENARIOS = {
    "ep 2": Scenario(2),
    "ep 4": Scenario(4),
    "one expert per rank": Scenario(4, experts=4),
    "many experts per rank, so that the sparse formulation runs": Scenario(2, experts=96, active="one"),
    "a rank without tokens": Scenario(4, tokens=(7, 0, 4, 9)),
    "no tokens in a whole group": Scenario(2, tokens=(0, 0, 4, 9)),
    "no tokens anywhere": Scenario(4, tokens=(0, 0, 0, 0)),
    "experts without a token": Scenario(4, active="not 1, 4 and 5"),
    "all tokens on one expert": Scenario(4, active="only 6"),
    "no remote expert is active": Scenario(4, active="own"),
    "every expert is active for every token": Scenario(4, active="all"),
    "tokens without an expert": Scenario(4, active="some none"),
    "two linears of one input": Scenario(4, outs=(5, 7)),
    "three linears of one input, ep 2": Scenario(2, outs=(5, 7, 4)),
    "many tokens": Scenario(4, tokens=(150, 40, 90, 3), outs=(5, 7)),
    "an input that needs no gradient": Scenario(4, input_gradient=False),
    "float32": Scenario(4, dtype=torch.float32, outs=(5, 7)),
    "bfloat16": Scenario(4, dtype=torch.bfloat16, outs=(5, 7)),
}
MODES: tuple[Mode, ...] = ("all_to_all", "gather", "auto")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}


def supports(scenario: Scenario, rank: int, draw: torch.Generator) -> list[Tensor]:
    """Return the support (T, E) of the tokens of `rank` for each linear."""
    T, E = scenario.tokens[rank], scenario.experts
    found = []
    for _ in scenario.outs:
        support = torch.rand(T, E, generator=draw) < (0.0 if scenario.active == "one" else 0.3)
        if scenario.active != "some none":
            support[torch.arange(T), torch.randint(0, E, (T,), generator=draw)] = True
        if scenario.active == "not 1, 4 and 5":  # 4 and 5 are all that rank 2 of 4 holds
            support[:, [1, 4, 5]] = False
        elif scenario.active == "only 6":
            support = torch.zeros_like(support)
            support[:, 6] = True
        elif scenario.active == "own":
            support = torch.zeros_like(support)
            support[:, Placement(E, scenario.ep_size, rank % scenario.ep_size).local] = True
        elif scenario.active == "all":
            support = torch.ones_like(support)
        found.append(support)
    return found


def make_inputs(scenario: Scenario, rank: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return x, p of each linear and the output gradients of `rank`; any rank can create those of all ranks."""
    draw = torch.Generator().manual_seed(100 + rank)
    T, wide = scenario.tokens[rank], torch.promote_types(scenario.dtype, torch.float32)
    x = (
        torch.randn(T, D, generator=draw, dtype=torch.float64)
        .to(scenario.dtype)
        .requires_grad_(scenario.input_gradient)
    )
    weights = [s * (torch.rand(s.shape, generator=draw) + 0.1).to(wide) for s in supports(scenario, rank, draw)]
    dy = [torch.randn(T, O, generator=draw, dtype=torch.float64).to(scenario.dtype) for O in scenario.outs]
    return x, [p.requires_grad_() for p in weights], dy


def make_banks(scenario: Scenario, local: slice) -> list[ExpertBank]:
    draw = torch.Generator().manual_seed(7)
    banks = []
    for O in scenario.outs:
        A, B = (torch.randn(scenario.experts, *s, generator=draw, dtype=torch.float64) for s in ((R, D), (O, R)))
        dtype = torch.promote_types(scenario.dtype, torch.float32)
        banks.append(ExpertBank(*(t[local].to(dtype).clone().requires_grad_() for t in (A, B)), 2.0))
    return banks


def run_backward(
    dispatch: Any,
    decision: Any,
    x: Tensor,
    ps: list[Tensor],
    banks: list[ExpertBank],
    dy: list[Tensor],
    repeated: bool = False,
) -> list[Tensor]:
    """Run forward and backward and return the outputs."""
    routings = [Routing(p, p, p[:, 0]) for p in ps]
    outputs = dispatch.start(x, routings, banks, decision, repeated)()
    torch.autograd.backward(outputs, dy)
    return outputs


def implied(scenario: Scenario, rank: int, fetched: list[Tensor], rounds: int = 1) -> Counter[str]:
    """Return the elements that `rank` must send, from the routing of its group and the experts that each rank fetches."""
    P, held, G = scenario.ep_size, scenario.experts // scenario.ep_size, len(scenario.outs)
    here = rank % P
    group = range(rank - here, rank - here + P)
    rows, sums, weights = torch.zeros(P, P), torch.zeros(P, P), torch.zeros(P, P)  # [source of the tokens, owner]
    for source in range(P):
        _, ps, _ = make_inputs(scenario, group[source])
        need = torch.stack([(p != 0).unflatten(1, (P, held)) for p in ps])  # (G, T, P, L)
        need = (need & ~fetched[group[source]].transpose(0, 1).unsqueeze(1)).any(-1)
        need[:, :, source] = False
        rows[source] = need.any(0).sum(0)
        back = (
            need if rounds == 1 else need.any(0).expand_as(need)
        )  # with rounds, every row returns a sum for every linear
        sums[source] = (back.sum(1) * torch.tensor(scenario.outs).unsqueeze(1)).sum(0)
        size = R * (D + torch.tensor(scenario.outs))
        weights[source] = (fetched[group[source]].sum(2) * size).sum(1)
    out, back = rows[here].sum(), rows[:, here].sum()
    wire = Counter(counts=(P - 1) * (G + G * held + P), rows=out * D, gates=out * G * held)
    wire |= Counter(sums=sums[:, here].sum(), weights=weights[:, here].sum())
    wire |= Counter(grad_rows=back * D * scenario.input_gradient, grad_gates=back * G * held)
    wire |= Counter(grad_sums=sums[here].sum(), grad_weights=weights[here].sum())
    if rounds > 1:  # rounds save nothing for the backward
        wire |= Counter(again_rows=wire["rows"], again_gates=wire["gates"])
    return Counter({kind: int(n) for kind, n in wire.items() if n})


def compare(scenario: Scenario, mode: Mode, rounds: int = 1) -> dict[str, Any]:
    """Return on each rank the distances of outputs and gradients from the reference, and the elements counted and implied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmole_dist.parallel.dispatch.number_of_rounds", lambda rows_PP: rounds)
        return _compare(scenario, mode, rounds)


def _compare(scenario: Scenario, mode: Mode, rounds: int) -> dict[str, Any]:
    parallel, rank = expert_parallel(scenario.ep_size, mode), dist.get_rank()
    placement = parallel.placement(scenario.experts)
    dispatch = parallel.dispatch()
    x, ps, dy = make_inputs(scenario, rank)
    banks = make_banks(scenario, placement.local)
    decision = dispatch.decide([p != 0 for p in ps], banks, "group")
    outputs = run_backward(dispatch, decision, x, ps, banks, dy)
    counted, counted_bytes = parallel.wire.by_kind(), dict(parallel.wire.bytes)
    x_again, ps_again, _ = make_inputs(scenario, rank)
    again = run_backward(
        dispatch, decision, x_again, ps_again, make_banks(scenario, placement.local), dy, repeated=True
    )
    doubled = parallel.wire.by_kind()
    fetched: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(fetched, decision.fetched_PGL)

    # The reference: every rank of the group in turn, in one process with all experts, in at least float32.
    wide = torch.promote_types(scenario.dtype, torch.float32)
    all_banks = make_banks(scenario, slice(None))
    distances = {}
    first = rank - placement.rank
    for source in range(first, first + scenario.ep_size):
        x_ref, ps_ref, dy_ref = make_inputs(scenario, source)
        x_ref = x_ref.detach().to(wide).requires_grad_()
        local = LocalDispatch()
        decision_ref = local.decide([p != 0 for p in ps_ref], all_banks, "group")
        outputs_ref = run_backward(local, decision_ref, x_ref, ps_ref, all_banks, [g.to(wide) for g in dy_ref])
        if source == rank:
            values = {"x": (x.grad, x_ref.grad)} if scenario.input_gradient else {}
            for g, (y, y_ref) in enumerate(zip(outputs, outputs_ref, strict=True)):
                values |= {f"y{g}": (y, y_ref), f"again{g}": (again[g], y_ref), f"p{g}": (ps[g].grad, ps_ref[g].grad)}
    for g, (bank, reference) in enumerate(zip(banks, all_banks, strict=True)):
        values[f"A{g}"] = bank.A_LRD.grad, reference.A_LRD.grad[placement.local]
        values[f"B{g}"] = bank.B_LOR.grad, reference.B_LOR.grad[placement.local]
    support = {f"p{g}": p != 0 for g, p in enumerate(ps)}
    for name, (value, reference) in values.items():
        if name in support:  # the router ignores gradients off the support, and remote ranks do not return any
            value, reference = value * support[name], reference * support[name]
        assert value is not None and value.shape == reference.shape, name
        difference = (value.detach().to(wide) - reference.detach()).norm()
        distances[name] = float(difference / reference.detach().norm().clamp_min(1e-30))
    dtypes = {name: values[name][0].dtype for name in values}
    expected = implied(scenario, rank, fetched, rounds)
    sizes = GroupSizes(D, scenario.outs, (R,) * len(scenario.outs), scenario.experts // scenario.ep_size)
    support = torch.stack([(p != 0).unflatten(1, (scenario.ep_size, -1)) for p in ps])
    closed = payload_elements(support, decision.fetched_PGL, placement.rank, sizes, rounds)
    closed["counts"] = count_message_elements(scenario.ep_size, sizes)
    return dict(
        distances=distances,
        dtypes=dtypes,
        wire=+counted,
        bytes=counted_bytes,
        doubled=doubled,
        implied=expected,
        closed=closed,
        fetched=decision.fetched_PGL,
    )


def check_closed_forms(results: list[dict[str, Any]], scenario: Scenario, rounds: int) -> None:
    """Check that the counts of all ranks equal what parallel/decision.py computes from their routing."""
    counted = sum((found["wire"] for found in results), Counter())
    closed = sum((Counter(found["closed"]) for found in results), Counter())
    back = {f"grad_{kind}": closed[kind] for kind in FORWARD if kind != "rows" or scenario.input_gradient}
    again = {f"again_{kind}": closed[kind] for kind in ("rows", "gates") if rounds > 1}
    assert counted == +Counter(closed | back | again)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_outputs_gradients_and_wire_counts(ranks4: LocalRanks, name: str, mode: Mode) -> None:
    scenario = SCENARIOS[name]
    narrow, wide = scenario.dtype, torch.promote_types(scenario.dtype, torch.float32)
    results = ranks4.run(compare, scenario, mode)
    check_closed_forms(results, scenario, 1)
    for rank, found in enumerate(results):
        for tensor, distance in found["distances"].items():
            assert distance < TOLERANCE[narrow], f"rank {rank}, {tensor}: {distance}"
            assert found["dtypes"][tensor] == (narrow if tensor[0] in "xya" else wide), tensor
        assert found["wire"] == found["implied"], f"rank {rank}"
        # A repeated forward sends the same payload, counted as "again_", and exchanges no counts.
        again = {f"again_{kind}": found["wire"][kind] for kind in FORWARD}
        back = {kind: 2 * n if kind.startswith("grad_") else n for kind, n in found["wire"].items()}
        assert +found["doubled"] == +Counter(back | again)
        remote = torch.arange(scenario.ep_size) != rank % scenario.ep_size
        assert not found["fetched"][~remote].any()
        if mode != "auto":
            assert found["fetched"][remote].eq(mode == "gather").all()


@pytest.mark.parametrize("mode", ["all_to_all", "auto"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_rounds_keep_outputs_and_gradients(ranks4: LocalRanks, name: str, mode: Mode) -> None:
    scenario = SCENARIOS[name]
    results = ranks4.run(compare, scenario, mode, 3)
    check_closed_forms(results, scenario, 3)
    for rank, found in enumerate(results):
        for tensor, distance in found["distances"].items():
            assert distance < TOLERANCE[scenario.dtype], f"rank {rank}, {tensor}: {distance}"
        assert found["wire"] == found["implied"], f"rank {rank}"


@pytest.mark.parametrize("name", ["ep 2", "ep 4", "all tokens on one expert", "many tokens", "float32"])
def test_auto_sends_at_most_the_better_fixed_mode(ranks4: LocalRanks, name: str) -> None:
    payload = {}
    for mode in MODES:
        results = ranks4.run(compare, SCENARIOS[name], mode)
        payload[mode] = sum(n for found in results for kind, n in found["wire"].items() if kind != "counts")
    assert payload["auto"] <= min(payload["all_to_all"], payload["gather"])
    if name == "many tokens":
        assert payload["auto"] < min(payload["all_to_all"], payload["gather"])


def test_rows_and_experts_are_sent_in_dtype_of_activations(ranks4: LocalRanks) -> None:
    for mode, kinds in (("all_to_all", ("rows", "sums")), ("gather", ("weights",))):
        for found in ranks4.run(compare, SCENARIOS["bfloat16"], mode):
            for kind in (*kinds, *(f"grad_{kind}" for kind in kinds)):
                assert found["bytes"]["group", kind] == 2 * found["wire"][kind] > 0


def test_linears_of_a_group_share_rows(ranks4: LocalRanks) -> None:
    both = Scenario(4, outs=(5, 7))
    together = ranks4.run(compare, both, "all_to_all")
    first = ranks4.run(compare, replace(both, outs=(5,)), "all_to_all")  # the same x and the same first linear
    for shared, alone in zip(together, first, strict=True):
        assert alone["wire"]["rows"] <= shared["wire"]["rows"] < 2 * alone["wire"]["rows"]


def test_only_counts_are_sent_if_no_remote_expert_is_active(ranks4: LocalRanks) -> None:
    for mode in ("all_to_all", "auto"):
        for found in ranks4.run(compare, SCENARIOS["no remote expert is active"], mode):
            assert found["wire"] == Counter(counts=3 * (1 + 2 + 4))


def exchange_by_hand(dtypes: list[torch.dtype]) -> tuple[list[Tensor], list[Tensor], Counter[str]]:
    """Exchange payloads, of which number i has s + q + i rows of i + 1 elements from rank s to rank q.

    Returns the received rows, the errors of the gradients, and the elements counted.
    """
    rank, wire = dist.get_rank(), Wire()
    payloads = []
    for i, dtype in enumerate(dtypes):
        send, recv = [rank + q + i for q in range(4)], [s + rank + i for s in range(4)]
        rows = torch.cat([torch.full((n, i + 1), 10 * rank + q) for q, n in enumerate(send)]).to(dtype)
        payloads.append(Payload(f"payload {i}", rows.requires_grad_(dtype.is_floating_point), send, recv))
    received = exchange(payloads, dist.group.WORLD, Tally(wire, "by hand"))
    floating = [i for i, dtype in enumerate(dtypes) if dtype.is_floating_point]
    torch.autograd.backward([received[i] for i in floating], [received[i].detach() * 2 for i in floating])
    wrong = [payloads[i].rows.grad - 2 * payloads[i].rows.detach() for i in floating]
    return [r.detach() for r in received], wrong, wire.by_kind()


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float64],
        [torch.float32],
        [torch.bfloat16],
        [torch.float16],
        [torch.bfloat16, torch.float32, torch.float64],
        [torch.float32, torch.int64, torch.bfloat16],
    ],
    ids=lambda dtypes: " ".join(str(d).removeprefix("torch.") for d in dtypes),
)
def test_exchange_of_several_tensors_and_their_gradients(ranks4: LocalRanks, dtypes: list[torch.dtype]) -> None:
    for rank, (received, wrong, wire) in enumerate(ranks4.run(exchange_by_hand, dtypes)):
        expected_wire: Counter[str] = Counter()
        for i, dtype in enumerate(dtypes):
            expected = [10 * source + rank for source in range(4) for _ in range(source + rank + i)]
            assert received[i].dtype == dtype and received[i].shape == (len(expected), i + 1)
            assert all(column.tolist() == expected for column in received[i].t())
            others = (i + 1) * sum(rank + q + i for q in range(4) if q != rank)
            expected_wire[f"payload {i}"] = others
            if dtype.is_floating_point:
                expected_wire[f"grad_payload {i}"] = others
        assert not any(difference.any() for difference in wrong)
        assert wire == expected_wire
