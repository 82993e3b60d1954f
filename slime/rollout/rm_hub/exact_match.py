"""--rm-type exact_match: 1 if the response is the label, blanks around both aside, else 0."""

from __future__ import annotations

from typing import Any

from slime.rollout.rm_hub.errors import required_label
from slime.utils.types import Sample


def exact_match_reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0. Raises ValueError for a sample without a label."""
    return float(sample.response.strip() == required_label("exact_match", sample).strip())
