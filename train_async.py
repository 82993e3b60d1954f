"""`python train_async.py ...` is `slime train-async ...`."""

import sys

from slime.cli.train_async import main

if __name__ == "__main__":
    sys.exit(main())
