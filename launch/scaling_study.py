"""Measure how training scales: `launch/scaling_study.py [--full] [--output FOLDER] ...`; the same as `ldmole scaling`."""

import sys

from ldmole_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["scaling", *sys.argv[1:]]))
