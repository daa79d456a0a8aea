"""Ranks against one process: gradients in float64 without the engine, updates in float32 through DeepSpeed."""

from collections.abc import Callable
from typing import Any

import pytest

from ldmole_dist.parallel.dispatch import Mode
from ldmole_dist.selftest import cases, parity
from ldmole_dist.selftest.local_ranks import LocalRanks

# DeepSpeed leaves parameters below its threshold whole, and here all are below the default.
PARTITION_ALL = {"stage3_param_persistence_threshold": 0}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_gradients(ranks4: LocalRanks, architecture: str, ep_size: int, checkpointing: bool) -> None:
    results = ranks4.run(parity.gradients, architecture, ep_size, checkpointing)
    distance, name = parity.worst(results)
    assert distance < 1e-12, name
    # 7 linears of 2 layers with A, B and router, 2 lambda-MLPs of 4 tensors, the loss and the logits.
    assert all(len(found) == 7 * 2 * 3 + 2 * 4 + 2 for found in results)


@pytest.mark.parametrize("mode", ["all_to_all", "gather"])
@pytest.mark.parametrize("ep_size", [2, 4])
def test_gradients_in_the_fixed_modes(ranks4: LocalRanks, ep_size: int, mode: Mode) -> None:
    distance, name = parity.worst(ranks4.run(parity.gradients, "llama", ep_size, True, mode))
    assert distance < 1e-12, name


# The tensors that a linear trains: A and B, and a router's weight.
TRAINED = {"topk": 3, "relu": 3, "softmax": 3, "top_p": 3, "lora": 2}


@pytest.mark.parametrize("mode", ["auto", "all_to_all", "gather"])
@pytest.mark.parametrize(
    "router", ["relu", "lora", *(pytest.param(name, marks=pytest.mark.full) for name in ("topk", "softmax", "top_p"))]
)
def test_gradients_of_other_routers(ranks4: LocalRanks, router: str, mode: Mode) -> None:
    results = ranks4.run(parity.gradients, "llama", 2 if mode == "auto" else 4, True, mode, router)
    distance, name = parity.worst(results)
    assert distance < 1e-12, name
    assert all(len(found) == 7 * 2 * TRAINED[router] + 2 for found in results)


STAGES = ["zero0", "zero1", "zero2", "zero3"]


def check_updates(
    ranks: LocalRanks, ds_config: str, ep_size: int, checkpointing: bool, architecture: str = "llama", **settings: Any
) -> None:
    """`settings`: the mode, and settings of DeepSpeed's zero_optimization."""
    distance, name = parity.worst(
        ranks.run(parity.updates, architecture, ds_config, ep_size, checkpointing, **settings)
    )
    assert distance < 1e-4, name


@pytest.mark.parametrize("ds_config", STAGES)
def test_updates(ranks4: LocalRanks, ds_config: str) -> None:
    check_updates(ranks4, ds_config, 2, True, **(PARTITION_ALL if ds_config == "zero3" else {}))


@pytest.mark.parametrize("ds_config", ["zero2_offload", pytest.param("zero3_offload", marks=pytest.mark.full)])
def test_updates_with_offload(ranks4: LocalRanks, ds_config: str) -> None:
    check_updates(ranks4, ds_config, 2, True, **(PARTITION_ALL if ds_config == "zero3_offload" else {}))


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("ds_config", STAGES)
def test_updates_everywhere(ranks4: LocalRanks, ds_config: str, ep_size: int, checkpointing: bool) -> None:
    check_updates(ranks4, ds_config, ep_size, checkpointing)


@pytest.mark.full
@pytest.mark.parametrize(
    ("router", "ds_config"),
    [*(("relu", stage) for stage in STAGES), *zip(("lora", "topk", "softmax", "top_p"), STAGES[1:] * 2, strict=False)]
    + [("lora", "zero3"), ("topk", "zero3")],
)
def test_updates_of_other_routers(ranks4: LocalRanks, router: str, ds_config: str) -> None:
    check_updates(ranks4, ds_config, 2, True, router=router, **(PARTITION_ALL if ds_config == "zero3" else {}))


BY_LAYER = [4, 8]  # the two decoder layers


@pytest.mark.full
@pytest.mark.parametrize(("router", "mode"), [("topk", "auto"), ("relu", "all_to_all"), ("sparsegen", "gather")])
def test_gradients_with_experts_by_layer(ranks4: LocalRanks, router: str, mode: Mode) -> None:
    results = ranks4.run(parity.gradients, "llama", 4, True, mode, router, BY_LAYER)
    distance, name = parity.worst(results)
    assert distance < 1e-12, name


@pytest.mark.full
@pytest.mark.parametrize(("router", "ds_config"), [("topk", "zero1"), ("sparsegen", "zero3")])
def test_updates_with_experts_by_layer(ranks4: LocalRanks, router: str, ds_config: str) -> None:
    zero = PARTITION_ALL if ds_config == "zero3" else {}
    check_updates(ranks4, ds_config, 2, True, router=router, num_experts=BY_LAYER, **zero)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["all_to_all", "gather"])
@pytest.mark.parametrize("ds_config", STAGES)
def test_updates_in_the_fixed_modes(ranks4: LocalRanks, ds_config: str, mode: Mode) -> None:
    check_updates(ranks4, ds_config, 4, ds_config != "zero2", mode=mode)


def in_rounds(function: Callable[..., dict[str, float]], *args: Any, **kwargs: Any) -> dict[str, float]:
    """The rows of every dispatch in three rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmole_dist.parallel.dispatch.number_of_rounds", lambda rows_PP: 3)
        return function(*args, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("mode", ["auto", "all_to_all"])
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
@pytest.mark.parametrize(("ds_config", "ep_size"), zip(STAGES, [1, 2, 4, 2], strict=True))
def test_updates_of_a_qwen3(ranks4: LocalRanks, ds_config: str, ep_size: int) -> None:
    check_updates(ranks4, ds_config, ep_size, True, "qwen3")


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_updates_with_everything_partitioned(ranks4: LocalRanks, ep_size: int, checkpointing: bool) -> None:
    check_updates(ranks4, "zero3", ep_size, checkpointing, **PARTITION_ALL)


@pytest.mark.parametrize("ep_size", [1, 4])
def test_replay_under_checkpointing(ranks4: LocalRanks, ep_size: int) -> None:
    results = ranks4.run(cases.replay, ep_size)
    distance, name = parity.worst(results)
    assert distance < 1e-12, name
    assert all(len(found) == 7 * 2 * 3 + 2 * 4 + 1 for found in results)


def test_a_nan_is_the_worst() -> None:
    assert parity.worst([{"a": 1.0}, {"b": float("nan"), "c": 2.0}]) == (float("inf"), "b")
