"""Sampled turns of a conversation, kept with its sample while it is under way: an interrupted one repeats them.

    tokens = [prompt | a a | told told | b b b]        turns: (told = prompt, tokens = a a), (told told, b b b)

A turn is repeated where all in front of it has the same tokens again, whatever became of the sample in between.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime.utils.types import PrefixCacheInfo, Sample, SampleStatus, SpecInfo


@dataclass(frozen=True)
class SampledTurn:
    """told: the tokens in front, of the prompt or since the turn before. status: ABORTED where it is not at its end.

    is_trained: False for one that --mask-offpolicy-in-partial-rollout leaves out.
    """

    told: list[int]
    told_text: str
    tokens: list[int]
    text: str
    log_probs: list[float] | None
    weight_versions: list[str]
    status: str
    is_trained: bool
    routed_experts: NDArray[np.integer[Any]] | None = None  # of the tokens that no turn before knows them of

    def append_to(self, sample: Sample) -> None:
        """Say it again."""
        sample.append_response_tokens(
            tokens=self.tokens,
            log_probs=self.log_probs,
            trainable=self.is_trained,
            text=self.text,
            routed_experts=self.routed_experts,
        )
        sample.weight_versions = sample.weight_versions + self.weight_versions
        sample.status = SampleStatus(self.status)


def turns_of(sample: Sample) -> list[SampledTurn]:
    """The turns that are kept with `sample`."""
    return [SampledTurn(**turn) for turn in sample.turns]


def keep_turn(sample: Sample, place: int, turn: SampledTurn) -> None:
    """Have `turn` be the one at `place`, and the last."""
    sample.turns = [*sample.turns[:place], dataclasses.asdict(turn)]


def start_over(sample: Sample) -> None:
    """Take back all that was generated."""
    sample.tokens, sample.response, sample.response_length = [], "", 0
    sample.loss_mask = sample.rollout_log_probs = sample.reward = None
    sample.weight_versions, sample.turns, sample.rollout_routed_experts = [], [], None
    sample.status = SampleStatus.PENDING
    sample.spec_info, sample.prefix_cache_info = SpecInfo(), PrefixCacheInfo()
    sample.non_generation_time = 0.0


def back_to_last_turn(sample: Sample) -> None:
    """`sample` as it was after the last turn that is kept with it, ABORTED. There must be one."""
    kept = sample.turns
    first, *others = turns_of(sample)
    start_over(sample)
    sample.tokens = first.told
    first.append_to(sample)
    for turn in others:
        sample.append_response_tokens(tokens=turn.told, trainable=False, text=turn.told_text)
        turn.append_to(sample)
    sample.turns, sample.status = kept, SampleStatus.ABORTED


def num_tokens_lost(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> int:
    """Tokens of the turns `before` that are not among those `after`: something in front of them came out otherwise."""
    place = 0
    while place < min(len(before), len(after)) and _goes_on(before[place], after[place]):
        place += 1
    return sum(len(turn["tokens"]) for turn in before[place:])


def _goes_on(before: dict[str, Any], after: dict[str, Any]) -> bool:
    tokens = before["tokens"]
    return bool(before["told"] == after["told"] and after["tokens"][: len(tokens)] == tokens)
