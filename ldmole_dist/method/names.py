"""Names of the routers, in a module that does not import torch."""

from typing import Literal, get_args

RouterName = Literal["sparsegen", "topk", "relu", "softmax", "top_p", "lora"]
ROUTER_NAMES: tuple[str, ...] = get_args(RouterName)
