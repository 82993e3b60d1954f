"""`python train.py ...` is `slime train ...`."""

import sys

from slime.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
