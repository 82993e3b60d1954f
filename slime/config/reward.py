"""How responses are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime.config.base import Group, arg, check, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Group):
    """Reward: the rule or the function that scores a response, and what its failures cost."""

    rm_type: str | None = arg(
        None,
        "Rule: dapo, deepscaler, exact_match, f1, gpqa, ifbench, math, random, remote_rm; boxed_X: X on the \\boxed{}.",
    )
    rm_url: str | None = arg(None, "Address of a reward server, for --rm-type remote_rm.")
    custom_rm_path: str | None = arg(None, "Reward function: async f(args, sample, **kw) -> float | dict.")
    custom_rm_style: Literal["slime", "trl", "verl", "verifiers"] = arg(
        "slime", "What --custom-rm-path names: a function of slime's form, or one of another library, as it is."
    )
    group_rm: bool = arg(False, "Score the samples of a group in one call: f(args, samples, **kw) -> list.")
    reward_key: str | None = arg(None, "Entry to train on where rewards are dicts.")
    eval_reward_key: str | None = arg(None, "Entry to report in evaluation (default: --reward-key).")
    rm_timeout_s: float = arg(600.0, "Deadline of one reward call, in seconds.")
    rm_num_workers: int | None = arg(
        None,
        "Processes for reward functions that are not async (default: one a CPU, at least 4); 0: threads of the rollout "
        "process, which a function that never lets go of the interpreter stops.",
    )
    max_failed_fraction: float = arg(0.0, "Share of a rollout's samples that may fail before the run stops.")
    custom_reward_post_process_path: str | None = arg(
        None, "f(args, samples) -> (raw_rewards, rewards): replaces the normalisation within groups."
    )

    def __post_init__(self) -> None:
        check_positive(self, "rm_timeout_s")
        check_not_negative(self, "rm_num_workers")
        check(0 <= self.max_failed_fraction <= 1, "max_failed_fraction", "between 0 and 1", self.max_failed_fraction)
        check(
            not self.group_rm or self.custom_rm_style != "verl", "group_rm", "off: a verl function has one sample", True
        )
        super().__post_init__()
