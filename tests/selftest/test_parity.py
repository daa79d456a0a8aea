"""Parity of four ranks with one process: gradients in float64 without DeepSpeed, updates in float32 through DeepSpeed.

The quick and full tiers hold every pair of settings; the nightly tests hold the cross products.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from ldmole_dist.parallel.dispatch import Mode
from ldmole_dist.selftest import cases, parity
from ldmole_dist.selftest.local_ranks import LocalRanks

# DeepSpeed does not partition parameters below this threshold, and all parameters of the tiny model are.
PARTITION_ALL = {"stage3_param_persistence_threshold": 0}
STAGES = ["zero0", "zero1", "zero2", "zero3"]
EP_SIZES = [1, 2, 4]
EXPERTS_BY_LAYER = [4, 8]  # of the two decoder layers


def other_cases(*settings: list[Any], without: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return the cross product of the settings without the cases of the other tiers."""
    return [case for case in product(*settings) if case not in without]


def check_gradients(ranks: LocalRanks, *args: Any) -> list[dict[str, float]]:
    results = ranks.run(parity.gradients, *args)
    distance, name = parity.worst(results)
    assert distance < 1e-12, name
    return results


def check_updates(ranks: LocalRanks, ds_config: str, *args: Any, architecture: str = "llama", **settings: Any) -> None:
    distance, name = parity.worst(ranks.run(parity.updates, architecture, ds_config, *args, **settings))
    assert distance < 1e-4, name


# Every pair of (architecture, ep_size, checkpointing).
GRADIENT_CASES = [
    ("llama", 1, False),
    ("llama", 2, True),
    ("llama", 4, True),
    ("qwen3", 1, True),
    ("qwen3", 2, False),
    ("qwen3", 4, False),
]


@pytest.mark.parametrize(("architecture", "ep_size", "checkpointing"), GRADIENT_CASES)
def test_gradients(ranks4: LocalRanks, architecture: str, ep_size: int, checkpointing: bool) -> None:
    results = check_gradients(ranks4, architecture, ep_size, checkpointing)
    # 7 linears of 2 layers with A, B and router, 2 lambda-MLPs of 4 tensors, the loss and the logits.
    assert all(len(found) == 7 * 2 * 3 + 2 * 4 + 2 for found in results)


@pytest.mark.parametrize(("ep_size", "checkpointing"), [(1, True), (2, False), (4, True)])
def test_gradients_of_routed_experts(ranks4: LocalRanks, ep_size: int, checkpointing: bool) -> None:
    results = check_gradients(ranks4, "qwen3_moe", ep_size, checkpointing)
    # 4 linears and 2 projections of routed experts of 2 layers.
    assert all(len(found) == 6 * 2 * 3 + 2 * 4 + 2 for found in results)


@pytest.mark.full
@pytest.mark.parametrize(("ds_config", "ep_size"), [("zero2", 2), ("zero3", 2), ("zero3", 4)])
def test_updates_of_routed_experts(ranks4: LocalRanks, ds_config: str, ep_size: int) -> None:
    zero = PARTITION_ALL if ds_config == "zero3" else {}
    check_updates(ranks4, ds_config, ep_size, ep_size == 4, architecture="qwen3_moe", **zero)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("architecture", "ep_size", "checkpointing"),
    other_cases(["llama", "qwen3"], EP_SIZES, [False, True], without=GRADIENT_CASES),
)
def test_gradients_of_all_combinations(
    ranks4: LocalRanks, architecture: str, ep_size: int, checkpointing: bool
) -> None:
    check_gradients(ranks4, architecture, ep_size, checkpointing)


@pytest.mark.parametrize("mode", ["all_to_all", "gather"])
@pytest.mark.parametrize("ep_size", [2, 4])
def test_gradients_in_fixed_modes(ranks4: LocalRanks, ep_size: int, mode: Mode) -> None:
    check_gradients(ranks4, "llama", ep_size, True, mode)


# Trained tensors of a linear: A, B and, except for "lora", the router's weight.
TENSORS = {"topk": 3, "relu": 3, "softmax": 3, "top_p": 3, "lora": 2}
ROUTER_CASES = [
    ("relu", "auto"),
    ("lora", "all_to_all"),
    ("relu", "gather"),
    ("topk", "auto"),
    ("softmax", "all_to_all"),
    ("top_p", "gather"),
]


def check_router(ranks: LocalRanks, router: str, mode: Mode) -> None:
    results = check_gradients(ranks, "llama", 2 if mode == "auto" else 4, True, mode, router)
    assert all(len(found) == 7 * 2 * TENSORS[router] + 2 for found in results)


@pytest.mark.parametrize(
    ("router", "mode"),
    [*ROUTER_CASES[:3], *(pytest.param(*case, marks=pytest.mark.full) for case in ROUTER_CASES[3:])],
)
def test_gradients_of_other_routers(ranks4: LocalRanks, router: str, mode: Mode) -> None:
    check_router(ranks4, router, mode)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("router", "mode"), other_cases(list(TENSORS), ["auto", "all_to_all", "gather"], without=ROUTER_CASES)
)
def test_gradients_of_other_routers_in_all_modes(ranks4: LocalRanks, router: str, mode: Mode) -> None:
    check_router(ranks4, router, mode)


@pytest.mark.parametrize("ds_config", STAGES)
def test_updates(ranks4: LocalRanks, ds_config: str) -> None:
    check_updates(ranks4, ds_config, 2, True, **(PARTITION_ALL if ds_config == "zero3" else {}))


@pytest.mark.parametrize("ds_config", ["zero2_offload", pytest.param("zero3_offload", marks=pytest.mark.full)])
def test_updates_with_offload(ranks4: LocalRanks, ds_config: str) -> None:
    check_updates(ranks4, ds_config, 2, True, **(PARTITION_ALL if ds_config == "zero3_offload" else {}))


# With `test_updates`, every pair of (stage, ep_size, checkpointing).
UPDATE_CASES = [(stage, ep, (i + ep) % 2 == 0) for i, stage in enumerate(STAGES) for ep in (1, 4)]
UPDATE_CASES.append(("zero2", 2, False))


@pytest.mark.full
@pytest.mark.parametrize(("ds_config", "ep_size", "checkpointing"), UPDATE_CASES)
def test_updates_with_other_ep_sizes(ranks4: LocalRanks, ds_config: str, ep_size: int, checkpointing: bool) -> None:
    check_updates(ranks4, ds_config, ep_size, checkpointing)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("ds_config", "ep_size", "checkpointing"), other_cases(STAGES, EP_SIZES, [False, True], without=UPDATE_CASES)
)
def test_updates_of_all_combinations(ranks4: LocalRanks, ds_config: str, ep_size: int, checkpointing: bool) -> None:
    check_updates(ranks4, ds_config, ep_size, checkpointing)


ROUTER_UPDATE_CASES = [
    ("relu", "zero3"),
    ("lora", "zero1"),
    ("topk", "zero2"),
    ("softmax", "zero3"),
    ("top_p", "zero1"),
]


@pytest.mark.full
@pytest.mark.parametrize(("router", "ds_config"), ROUTER_UPDATE_CASES)
def test_updates_of_other_routers(ranks4: LocalRanks, router: str, ds_config: str) -> None:
    check_updates(ranks4, ds_config, 2, True, router=router, **(PARTITION_ALL if ds_config == "zero3" else {}))


@pytest.mark.nightly
@pytest.mark.parametrize(("router", "ds_config"), other_cases(list(TENSORS), STAGES, without=ROUTER_UPDATE_CASES))
def test_updates_of_other_routers_under_all_stages(ranks4: LocalRanks, router: str, ds_config: str) -> None:
    check_updates(ranks4, ds_config, 2, True, router=router, **(PARTITION_ALL if ds_config == "zero3" else {}))


@pytest.mark.full
@pytest.mark.parametrize(("router", "mode"), [("topk", "auto"), ("relu", "all_to_all"), ("sparsegen", "gather")])
def test_gradients_with_experts_by_layer(ranks4: LocalRanks, router: str, mode: Mode) -> None:
    check_gradients(ranks4, "llama", 4, True, mode, router, EXPERTS_BY_LAYER)


@pytest.mark.full
@pytest.mark.parametrize(("router", "ds_config"), [("topk", "zero1"), ("sparsegen", "zero3")])
def test_updates_with_experts_by_layer(ranks4: LocalRanks, router: str, ds_config: str) -> None:
    zero = PARTITION_ALL if ds_config == "zero3" else {}
    check_updates(ranks4, ds_config, 2, True, router=router, num_experts=EXPERTS_BY_LAYER, **zero)


MODE_CASES = [("zero0", "all_to_all"), ("zero1", "gather"), ("zero2", "all_to_all"), ("zero3", "gather")]


@pytest.mark.full
@pytest.mark.parametrize(("ds_config", "mode"), MODE_CASES)
def test_updates_in_fixed_modes(ranks4: LocalRanks, ds_config: str, mode: Mode) -> None:
    check_updates(ranks4, ds_config, 4, ds_config != "zero2", mode=mode)


@pytest.mark.nightly
@pytest.mark.parametrize(("ds_config", "mode"), other_cases(STAGES, ["all_to_all", "gather"], without=MODE_CASES))
def test_updates_in_fixed_modes_under_all_stages(ranks4: LocalRanks, ds_config: str, mode: Mode) -> None:
    check_updates(ranks4, ds_config, 4, ds_config != "zero2", mode=mode)


def in_rounds(function: Callable[..., dict[str, float]], *args: Any, **kwargs: Any) -> dict[str, float]:
    """Call a function with the rows of every dispatch sent in three rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmole_dist.parallel.dispatch.number_of_rounds", lambda rows_PP: 3)
        return function(*args, **kwargs)


@pytest.mark.parametrize(("mode", "checkpointing"), [("auto", False), ("all_to_all", True)])
def test_gradients_in_rounds(ranks4: LocalRanks, mode: Mode, checkpointing: bool) -> None:
    distance, name = parity.worst(ranks4.run(in_rounds, parity.gradients, "llama", 4, checkpointing, mode))
    assert distance < 1e-12, name


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_updates_in_rounds_under_zero3(ranks4: LocalRanks, checkpointing: bool) -> None:
    args = ("llama", "zero3", 2, checkpointing, "all_to_all")
    distance, name = parity.worst(ranks4.run(in_rounds, parity.updates, *args, **PARTITION_ALL))
    assert distance < 1e-4, name


@pytest.mark.full
@pytest.mark.parametrize(
    ("ds_config", "ep_size"),
    [pytest.param("zero0", 1, marks=pytest.mark.nightly), ("zero1", 2), ("zero2", 4)]
    + [pytest.param("zero3", 2, marks=pytest.mark.nightly)],
)
def test_updates_of_a_qwen3(ranks4: LocalRanks, ds_config: str, ep_size: int) -> None:
    check_updates(ranks4, ds_config, ep_size, True, architecture="qwen3")


# With `test_updates`, every ep_size, with and without checkpointing.
PARTITIONED_CASES = [(1, True), (2, False), (4, False)]


@pytest.mark.full
@pytest.mark.parametrize(("ep_size", "checkpointing"), PARTITIONED_CASES)
def test_updates_with_everything_partitioned(ranks4: LocalRanks, ep_size: int, checkpointing: bool) -> None:
    check_updates(ranks4, "zero3", ep_size, checkpointing, **PARTITION_ALL)


@pytest.mark.nightly
@pytest.mark.parametrize(("ep_size", "checkpointing"), other_cases(EP_SIZES, [False, True], without=PARTITIONED_CASES))
def test_all_updates_with_everything_partitioned(ranks4: LocalRanks, ep_size: int, checkpointing: bool) -> None:
    check_updates(ranks4, "zero3", ep_size, checkpointing, **PARTITION_ALL)


@pytest.mark.parametrize("ep_size", [1, 4])
def test_replay_under_checkpointing(ranks4: LocalRanks, ep_size: int) -> None:
    results = ranks4.run(cases.replay, ep_size)
    distance, name = parity.worst(results)
    assert distance < 1e-12, name
    assert all(len(found) == 7 * 2 * 3 + 2 * 4 + 1 for found in results)


def test_nan_is_the_largest_distance() -> None:
    assert parity.worst([{"a": 1.0}, {"b": float("nan"), "c": 2.0}]) == (float("inf"), "b")
