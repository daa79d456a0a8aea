"""Expert-parallel groups in DeepSpeed, and telling it which parameters are experts.

DeepSpeed must reduce an expert's gradient over the ranks that hold the same expert (the expert-data-parallel group) and
nothing else; which declaration makes it do so differs by ZeRO stage (docs/clusters.md holds the measured table):
the attributes below always, a marker module at stages 0 to 2, split optimizer groups at stages 1 and 2.
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
    """Groups of `ep_size` consecutive ranks, which hold one copy of all experts between them; every rank calls it.

    Args:
        ep_size: 1 leaves all experts on every rank.
        mode: what may move between the ranks of a group (`ExpertParallel`).
        overlap: whether it moves while the frozen linears compute.

    Raises:
        UserError: if the ranks cannot be grouped so.
    """
    check_ep_size(ep_size, dist.get_world_size())
    if ep_size == 1:
        return ExpertParallel()
    groups._create_expert_and_data_parallel(ep_size)
    return ExpertParallel(groups._get_expert_parallel_group(_group_name(ep_size)), mode, overlap)


def _group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"


class _ExpertMarker(MoE):
    """Tells DeepSpeed's stages 0 to 2 that the model has experts; holds nothing and computes nothing."""

    def __init__(self, num_experts: int, ep_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size, self.num_local_experts = num_experts, ep_size, num_experts // ep_size
        self.expert_group_name = _group_name(ep_size)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already."""


def mark_experts(model: nn.Module, num_experts: int, ep_size: int, stage: int) -> None:
    """Declare the expert parameters of `model` to DeepSpeed; call before `deepspeed.initialize`."""
    if ep_size == 1:
        return
    name = _group_name(ep_size)
    data_parallel = groups._get_expert_data_parallel_group(name)
    trained = False
    parameter: Any  # DeepSpeed reads these from the parameter itself
    for parameter_name, parameter in model.named_parameters():
        if is_expert_tensor(parameter_name):  # frozen ones too: every rank has its own
            trained = trained or parameter.requires_grad
            parameter.allreduce, parameter.group_name = False, name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_partition_process_group = data_parallel
    if stage < 3 and trained:  # stages 1 and 2 want experts in the optimizer of a model that has some
        model.add_module("expert_marker", _ExpertMarker(num_experts, ep_size))


def optimizer_groups(model: nn.Module, ep_size: int, stage: int) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: experts apart where DeepSpeed wants them so."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    everything: list[dict[str, Any]] = [{"params": trainable, "name": "adapter"}]
    if ep_size > 1 and stage in (1, 2):
        everything = split_params_into_different_moe_groups_for_optimizer(everything)
    return [group for group in everything if group["params"]]


def check_partition_groups(model: nn.Module, ep_size: int) -> None:
    """Under ZeRO-3: every expert must be partitioned over the ranks that hold the same expert, or it corrupts silently.

    Raises:
        RuntimeError: naming the parameter, if DeepSpeed did not honour the attributes that `mark_experts` set.
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
                    f"{name} is partitioned over ranks {ranks} instead of {expected}: unsupported deepspeed version?"
                )


@torch.no_grad()
def clip_local_gradients(model: nn.Module, max_norm: float, parallel: ExpertParallel) -> float:
    """Scale whole local gradients (stage 0) so that the norm over all ranks' parameters is at most `max_norm`.

    DeepSpeed's own clipping at stage 0 averages the ranks' norms and gets experts wrong.

    Args:
        model: gradients already reduced.
        max_norm: 0 only measures.
        parallel: over which ranks the experts are spread.

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
