"""Entry point for launchers: `deepspeed launch/train.py CONFIG.yaml [a.b=c ...]` runs `ldmole train` on each rank."""

import sys

from ldmole_dist.cli import main

if __name__ == "__main__":
    # Launchers may insert options of their own before the config (--local_rank=0), so the subcommand comes first.
    sys.exit(main(["train", *sys.argv[1:]]))
