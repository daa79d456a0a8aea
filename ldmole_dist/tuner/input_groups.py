"""Input groups: the linears of a model that read the same tensor (q, k, v; gate, up), found by tracing a forward."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def find_input_groups(model: nn.Module, names: Collection[str]) -> list[list[str]]:
    """Group linears that read the same tensor object in a forward.

    Runs the forward of a copy of the model on the meta device, with two tokens. This computes nothing, allocates no memory, and
    also works if the weights of the model are partitioned.

    Args:
        model: backbone. Adapters in it have no effect, because the copy is created from its config.
        names: names of the linears to group.

    Returns:
        The names of each group, in the order of calls. A linear that is not called has a group of its own. So does every linear
        if the model is not a `PreTrainedModel` or cannot run on the meta device. This needs more dispatches, but gives the same
        results, except that each linear then has its own dropout mask.
    """
    inputs: dict[str, Tensor] = {}  # keeps the tensors alive: id() is unique only among objects that exist

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(name, args[0])

        return hook

    if isinstance(model, PreTrainedModel):
        config = copy.deepcopy(model.config)
        # Some attention kernels, such as flash-attention, do not run on the meta device. Eager attention does, and the linears
        # read the same tensors with it.
        config._attn_implementation = "eager"
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
                copied = type(model)(config).eval()
                for name, module in copied.named_modules():
                    if name in names:
                        module.register_forward_pre_hook(record(name))
                copied(input_ids=torch.zeros(1, 2, dtype=torch.long))
        except Exception as error:
            logger.warning(
                "each linear is dispatched separately, because this model does not run on the meta device (%s); this is "
                "slower, but without dropout the results are the same",
                error,
            )
            inputs.clear()
    groups: dict[int, list[str]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), []).append(name)
    return [*groups.values(), *([name] for name in names if name not in inputs)]
