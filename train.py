"""`python train.py ...` is `slime train ...`.

Flags of your own: `main(extra_args_provider=f)`, where `f(parser)` adds them and returns the parser. With the Megatron
backend a function of that name in `pretrain_gpt`, on PYTHONPATH, is found by itself.
"""

import sys

from slime.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
