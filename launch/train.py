"""Entry point for launchers: `deepspeed launch/train.py CONFIG.yaml [a.b=c ...]`. Same as `ldmole train`."""

import sys

from ldmole_dist.cli import main

if __name__ == "__main__":
    # Launchers put options of their own before the config (--local_rank=0).
    sys.exit(main(["train", *sys.argv[1:]]))
