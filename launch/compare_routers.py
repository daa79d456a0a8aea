"""Compare routers and plain LoRA: `launch/compare_routers.py CONFIG ...`; the same as `ldmole compare`."""

import sys

from ldmole_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
