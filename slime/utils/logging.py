"""Set-up of the log, once a process."""

from __future__ import annotations

import logging
import os
import warnings


def configure_logging(level: str) -> None:
    """Send slime's log to standard error at `level` ("debug", "info", "warning"); silence libraries' chatter."""
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("slime").setLevel(level.upper())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
