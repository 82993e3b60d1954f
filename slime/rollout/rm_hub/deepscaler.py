r"""--rm-type deepscaler: the rule of DeepScaleR: --rm-type math on what follows the reasoning, whose end must be there.

A response without `</think>` (or `###Response`, the mark of older templates) never came to an answer and scores 0, as
does one whose answer stands in no \boxed{}.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from slime.rollout.rm_hub.answers import extract_boxed
from slime.rollout.rm_hub.errors import required_label
from slime.rollout.rm_hub.math_rule import math_reward
from slime.utils.types import Sample

_ENDS_OF_REASONING = ("</think>", "###Response")


async def deepscaler_reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0. Raises ValueError for a sample without a label."""
    required_label("deepscaler", sample)
    mark = next((mark for mark in _ENDS_OF_REASONING if mark in sample.response), None)
    if mark is None:
        return 0.0
    solution = sample.response.rpartition(mark)[2]
    if not extract_boxed(solution):
        return 0.0
    return await math_reward(args, dataclasses.replace(sample, response=solution))
