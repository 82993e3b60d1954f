"""Rewards: the rules named by --rm-type, and reward functions of users.

Which one scores a sample, first that is set: `sample.custom_rm_path`, --custom-rm-path, `sample.metadata["rm_type"]`,
--rm-type. A rule is a function (args, sample) -> reward, async where it waits; one file each in this folder.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from slime.rollout.rm_hub.answers import extract_boxed
from slime.rollout.rm_hub.coin import random_reward
from slime.rollout.rm_hub.custom import custom_reward, custom_rewards
from slime.rollout.rm_hub.dapo import dapo_reward
from slime.rollout.rm_hub.deepscaler import deepscaler_reward
from slime.rollout.rm_hub.errors import Reward, RewardError, checked_reward
from slime.rollout.rm_hub.exact_match import exact_match_reward
from slime.rollout.rm_hub.f1 import f1_reward
from slime.rollout.rm_hub.gpqa import gpqa_reward
from slime.rollout.rm_hub.ifbench import ifbench_reward
from slime.rollout.rm_hub.math_rule import math_reward
from slime.rollout.rm_hub.remote import remote_rm
from slime.utils.types import Sample

__all__ = [
    "RULES",
    "RULES_OF_DICTS",
    "RULES_WITH_LABEL",
    "Reward",
    "RewardError",
    "async_rm",
    "batched_async_rm",
    "check_rm_type",
    "rule_reward",
]

RULES: dict[str, Callable[[Any, Sample], Any]] = {
    "dapo": dapo_reward,
    "deepscaler": deepscaler_reward,
    "exact_match": exact_match_reward,
    "f1": f1_reward,
    "gpqa": gpqa_reward,
    "ifbench": ifbench_reward,
    "math": math_reward,
    "random": random_reward,
    "remote_rm": remote_rm,
}
RULES_WITH_LABEL = frozenset({"dapo", "deepscaler", "exact_match", "f1", "gpqa", "math"})
RULES_OF_DICTS = frozenset({"dapo"})  # their rewards need a --reward-key
BOXED_PREFIX = "boxed_"  # boxed_dapo: dapo on what stands in the last \boxed{}


def check_rm_type(rm_type: str) -> str:
    """The rule's name without `boxed_`. Raises ValueError for a rule that is not known."""
    name = rm_type.removeprefix(BOXED_PREFIX)
    if name not in RULES:
        raise ValueError(f"--rm-type must be {', '.join(RULES)}, or one of them behind {BOXED_PREFIX}, got {rm_type!r}")
    return name


async def async_rm(args: Any, sample: Sample, **kwargs: Any) -> Reward:
    """The reward of one sample, a finite number or a dict with such.

    kwargs: passed on to a user's function `f(args, sample, **kwargs)`, which may be async or not.
    Raises RewardError if this sample cannot be scored (the function raised, took longer than args.rm_timeout_s,
    returned NaN, ...), ValueError if no sample can: an unknown rule, a path that does not import.
    """
    path = sample.custom_rm_path or args.custom_rm_path
    if path is not None:
        return checked_reward(await custom_reward(args, path, sample, kwargs), path, sample)
    return await rule_reward(args, sample)


async def rule_reward(args: Any, sample: Sample) -> Reward:
    """The reward of the rule that the sample or --rm-type names; errors as `async_rm`."""
    rm_type = sample.metadata.get("rm_type") or args.rm_type
    if rm_type is None:
        raise ValueError("no reward is chosen: give --rm-type or --custom-rm-path")
    name = check_rm_type(rm_type)
    if name != rm_type:
        sample = dataclasses.replace(sample, response=extract_boxed(sample.response))
    reward = RULES[name](args, sample)
    if inspect.iscoroutine(reward):
        reward = await reward
    return checked_reward(reward, rm_type, sample)


async def batched_async_rm(args: Any, samples: list[Sample], **kwargs: Any) -> list[Reward]:
    """The rewards of several samples, in their order.

    With --group-rm the function of --custom-rm-path gets all of them at once: `f(args, samples, **kwargs) -> list`.
    Otherwise they are scored side by side. Raises as `async_rm`, for the first sample that fails.
    """
    if args.group_rm and args.custom_rm_path is not None:
        return await _score_group(args, samples, kwargs)
    rewards = await asyncio.gather(*(async_rm(args, sample, **kwargs) for sample in samples), return_exceptions=True)
    return [_raise_if_error(reward) for reward in rewards]


async def _score_group(args: Any, samples: list[Sample], kwargs: dict[str, Any]) -> list[Reward]:
    path = args.custom_rm_path
    if not samples:
        return []
    rewards = await custom_rewards(args, path, samples, kwargs)
    return [checked_reward(reward, path, sample) for reward, sample in zip(rewards, samples, strict=True)]


def _raise_if_error(reward: Reward | BaseException) -> Reward:
    if isinstance(reward, BaseException):
        raise reward
    return reward
