"""Which linears of a model read the same tensor (q, k, v; gate, up), found by running it and not from names."""

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
    """Groups of linears that are given the very same tensor.

    A copy of the model without memory (on the meta device) is run on two tokens: nothing is computed, and a model whose
    weights are partitioned is not touched.

    Args:
        model: bare, before adapters are injected.
        names: of the linears to group.

    Returns:
        Each group in the order of its calls; a linear that was not called, or a model that cannot be copied so, gives groups
        of one (correct, with more dispatches).
    """
    inputs: dict[str, Tensor] = {}  # kept alive: an address is unique only as long as its tensor lives

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.setdefault(name, args[0])

        return hook

    if isinstance(model, PreTrainedModel):
        config = copy.deepcopy(model.config)
        config._attn_implementation = "eager"  # fused kernels have no meta implementation; who reads what is the same
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
                twin = type(model)(config).eval()
                for name, module in twin.named_modules():
                    if name in names:
                        module.register_forward_pre_hook(remember(name))
                twin(input_ids=torch.zeros(1, 2, dtype=torch.long))
        except Exception as error:
            logger.warning(
                "every linear is dispatched on its own: this model does not run on the meta device (%s)", error
            )
            inputs.clear()
    groups: dict[int, list[str]] = {}
    for name, tensor in inputs.items():
        groups.setdefault(id(tensor), []).append(name)
    return [*groups.values(), *([name] for name in names if name not in inputs)]
