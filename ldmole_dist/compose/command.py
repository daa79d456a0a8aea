"""`ldmole compose`: its arguments."""

from __future__ import annotations

import argparse

COMPOSE = """Makes an LD-MoLE adapter of LoRA adapters that PEFT has saved, one expert each. Train its routers with
adapter.init_from=OUTPUT; the experts stay as they are."""
ROUTERS = ("sparsegen", "topk", "relu", "softmax", "top_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldmole compose`."""
    parser.add_argument("output", help="folder to make")
    parser.add_argument("adapters", nargs="+", help="folders of LoRA adapters of the same backbone")
    parser.add_argument("--backbone", metavar="PATH", help="if it is not where the adapters say")
    parser.add_argument("--router", choices=ROUTERS, default="sparsegen", help="(default: %(default)s)")
    parser.add_argument(
        "--router-input",
        choices=("layer", "hidden"),
        default="layer",
        help="what routers read: their linear's input, or, as X-LoRA's, hidden states of a forward without the adapter",
    )
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts of a token, with --router topk")
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Compose.

    Raises:
        UserError: where an adapter cannot be an expert, or the folder exists.
    """
    from ldmole_dist.compose.build import compose

    config = compose(args.output, args.adapters, args.backbone, args.router, args.top_k, args.router_input)
    print(f"{config.num_experts} experts of rank {config.r}: train their routers with adapter.init_from={args.output}")
    return 0
