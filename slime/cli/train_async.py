"""`slime train-async`: as `slime train`, with engines one rollout ahead of the trainers."""

from __future__ import annotations

from collections.abc import Sequence

from slime.cli import train


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code, as of `slime train`."""
    return train.main(argv, is_async=True)
