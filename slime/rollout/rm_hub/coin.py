"""--rm-type random: 0 or 1 by a coin, for trying a pipeline out and as a baseline that must not learn."""

from __future__ import annotations

import random
from typing import Any

from slime.utils.types import Sample


def random_reward(args: Any, sample: Sample) -> float:
    """The coin is seeded by args.rollout_seed and the sample's index: equal runs have equal rewards."""
    return float(random.Random(f"{args.rollout_seed}/{sample.index}").getrandbits(1))
