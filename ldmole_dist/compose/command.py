"""`ldmole compose`: arguments and output."""

from __future__ import annotations

import argparse

from ldmole_dist.method.names import ROUTER_NAMES

COMPOSE = """Compose an LD-MoLE adapter from LoRA adapters that PEFT saved; each becomes one expert. To train the routers, run
`ldmole train` with adapter.init_from=OUTPUT; the experts remain frozen."""
ROUTERS = tuple(name for name in ROUTER_NAMES if name != "lora")  # "lora" has no router to train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole compose`."""
    parser.add_argument("output", help="folder for the new adapter")
    parser.add_argument("adapters", nargs="+", help="folders of LoRA adapters of the same backbone")
    parser.add_argument("--backbone", metavar="PATH", help="path of the backbone (default: the adapters' backbone)")
    parser.add_argument(
        "--router", choices=ROUTERS, default="sparsegen", help="router of the new adapter (default: %(default)s)"
    )
    parser.add_argument(
        "--router-input",
        choices=("layer", "hidden"),
        default="layer",
        help="input of each router: 'layer' is the input of its linear; 'hidden', as in X-LoRA, the last hidden states of a "
        "forward pass without the adapter (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=2,
        metavar="K",
        help="active experts per token with --router topk (default: %(default)s)",
    )
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Compose an adapter, and print its number of experts, its LoRA rank and how to train its routers.

    Returns:
        Exit code 0.

    Raises:
        UserError: as in `build.compose`.
    """
    from ldmole_dist.compose.build import compose

    config = compose(args.output, args.adapters, args.backbone, args.router, args.top_k, args.router_input)
    print(f"{config.num_experts} experts of r={config.r}; to train the routers, set adapter.init_from={args.output}")
    return 0
