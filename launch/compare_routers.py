"""Routers and plain LoRA, the same data, budget and seeds: `launch/compare_routers.py CONFIG ...`. Same as `ldmole compare`."""

import sys

from ldmole_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
