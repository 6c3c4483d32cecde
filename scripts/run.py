"""Runs one experiment, or a sweep with -m: `python scripts/run.py method=dkd student=resnet18`."""

import sys

from compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
