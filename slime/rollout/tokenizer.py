"""The tokenizer of a run, read once in a process."""

from __future__ import annotations

import functools
from typing import Any

from slime.utils.processing_utils import load_tokenizer


def tokenizer_of(args: Any) -> Any:
    """That of --hf-checkpoint; its own code runs only with --trust-remote-code."""
    return _tokenizer(args.hf_checkpoint, args.trust_remote_code)


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    return load_tokenizer(path, trust_remote_code=trust_remote_code)
