"""Expert-parallel groups in DeepSpeed, and the declaration of expert parameters to DeepSpeed.

DeepSpeed must reduce an expert's gradient only over the ranks that hold the same expert (its expert-data-parallel group). The
declaration depends on the ZeRO stage (docs/clusters.md): parameter attributes at every stage, a marker module at stages 0 to 2,
and separate optimizer groups at stages 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from ldmole_dist.config import check_ep_size
from ldmole_dist.parallel.dispatch import ExpertParallel, Mode
from ldmole_dist.tuner.state_dict import is_expert_tensor


def expert_parallel(ep_size: int, mode: Mode = "auto", overlap: bool = True) -> ExpertParallel:
    """Create the expert-parallel groups and return that of this rank. Collective: every rank must call it.

    Each group has `ep_size` consecutive ranks, which together hold all experts once.

    Args:
        ep_size: ranks per group; 1 keeps all experts on every rank.
        mode: exchange mode of the groups (see `ExpertParallel`).
        overlap: whether to exchange while the frozen linears and the local experts compute.

    Raises:
        UserError: if `ep_size` does not divide the world size.
    """
    check_ep_size(ep_size, dist.get_world_size())
    if ep_size == 1:
        return ExpertParallel()
    groups._create_expert_and_data_parallel(ep_size)
    return ExpertParallel(groups._get_expert_parallel_group(_group_name(ep_size)), mode, overlap)


def _group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"


class _ExpertMarker(MoE):
    """Empty MoE module, by which DeepSpeed recognizes at ZeRO stages 0 to 2 that the model has experts."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size, self.num_local_experts = num_experts, ep_size, num_experts // ep_size
        self.expert_group_name = _group_name(ep_size)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing, because the groups exist already."""


def mark_experts(model: nn.Module, num_experts: int, ep_size: int, stage: int) -> None:
    """Declare the expert parameters of `model` to DeepSpeed; call it before `deepspeed.initialize`.

    Args:
        model: model with its adapter injected.
        num_experts: largest number of experts of any linear.
        ep_size: number of ranks per expert-parallel group; with 1 there is nothing to declare.
        stage: ZeRO stage.
    """
    if ep_size == 1:
        return
    name = _group_name(ep_size)
    data_parallel = groups._get_expert_data_parallel_group(name)
    trained = False
    parameter: Any  # nn.Parameter does not declare the attributes set below, which DeepSpeed reads
    for parameter_name, parameter in model.named_parameters():
        if is_expert_tensor(parameter_name):  # frozen ones too, because they differ between ranks
            trained = trained or parameter.requires_grad
            parameter.allreduce, parameter.group_name = False, name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_partition_process_group = data_parallel
    # Add no marker if all experts are frozen: with the marker, stages 1 and 2 fail unless an optimizer group has experts.
    if stage < 3 and trained:
        model.add_module("expert_marker", _ExpertMarker(num_experts, ep_size))


def optimizer_groups(model: nn.Module, ep_size: int, stage: int) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer.

    At ZeRO stages 1 and 2, experts are in separate groups if they are spread over ranks (ep_size > 1).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    everything: list[dict[str, Any]] = [{"params": trainable, "name": "adapter"}]
    if ep_size > 1 and stage in (1, 2):
        everything = split_params_into_different_moe_groups_for_optimizer(everything)
    return [group for group in everything if group["params"]]


def check_partition_groups(model: nn.Module, ep_size: int) -> None:
    """Check under ZeRO-3 that each expert is partitioned only over the ranks that hold it.

    Partitioning an expert over other ranks would mix different experts.

    Raises:
        RuntimeError: if DeepSpeed ignores the attributes that `mark_experts` sets.
    """
    if ep_size == 1:
        return
    expected = dist.get_process_group_ranks(groups._get_expert_data_parallel_group(_group_name(ep_size)))
    parameter: Any
    for name, parameter in model.named_parameters():
        if is_expert_tensor(name):
            ranks = dist.get_process_group_ranks(parameter.ds_process_group)
            if ranks != expected:
                raise RuntimeError(
                    f"{name} is partitioned over ranks {ranks} instead of {expected}; install deepspeed 0.19.8"
                )


@torch.no_grad()
def clip_local_gradients(model: nn.Module, max_norm: float, parallel: ExpertParallel) -> float:
    """Clip the gradients in place, at ZeRO stage 0, by their norm over the parameters of all ranks. Collective.

    At stage 0, DeepSpeed 0.19.8 averages the norms of the ranks, which is incorrect for experts.

    Args:
        model: model whose gradients have been averaged over ranks.
        max_norm: norm to clip to; 0 only computes the norm.
        parallel: expert-parallel group that the experts are spread over.

    Returns:
        The norm before clipping.
    """
    squares: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    gradients = []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad)
            squares[is_expert_tensor(name)].append(parameter.grad.float().pow(2).sum())
    device = gradients[0].device
    experts = torch.stack(squares[True]).sum() if squares[True] else torch.zeros((), device=device)
    dense = torch.stack(squares[False]).sum() if squares[False] else torch.zeros((), device=device)
    if parallel.group is not None:
        dist.all_reduce(experts, group=parallel.group)
    norm = (dense + experts).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
    return float(norm)
