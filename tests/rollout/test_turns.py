"""Turns that are kept with a sample, said again, and those that are lost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from slime.rollout.turns import SampledTurn, back_to_last_turn, keep_turn, num_tokens_lost, turns_of
from slime.utils.types import Sample, SampleStatus

FIRST = SampledTurn([1, 2], "", [3, 4], "cd", [-0.3, -0.4], ["5"], "completed", True)
SECOND = SampledTurn([6], "f", [7, 8], "gh", [-0.7, -0.8], ["5", "6"], "truncated", False)


def kept(*turns: SampledTurn) -> list[dict[str, Any]]:
    return [dataclasses.asdict(turn) for turn in turns]


def test_a_sample_is_as_it_was_after_its_last_turn() -> None:
    sample = Sample(index=3, metadata={"label": "x"}, tokens=[9, 9, 9, 9], response_length=2, loss_mask=[1, 1])
    keep_turn(sample, 0, FIRST)
    keep_turn(sample, 1, SECOND)
    back_to_last_turn(sample)
    sample.check()
    assert sample.tokens == [1, 2, 3, 4, 6, 7, 8] and sample.response == "cdfgh"
    assert sample.loss_mask == [1, 1, 0, 0, 0]
    assert sample.rollout_log_probs == [-0.3, -0.4, 0.0, -0.7, -0.8]
    assert sample.weight_versions == ["5", "5", "6"]
    assert sample.status is SampleStatus.ABORTED and sample.index == 3
    assert turns_of(sample) == [FIRST, SECOND]


def test_a_turn_takes_the_place_of_what_came_after_it() -> None:
    sample = Sample(turns=kept(FIRST, SECOND))
    keep_turn(sample, 0, SECOND)
    assert turns_of(sample) == [SECOND]


@pytest.mark.parametrize(
    ("after", "lost"),
    [
        ([FIRST, SECOND], 0),
        ([FIRST, dataclasses.replace(SECOND, tokens=[7, 8, 9])], 0),  # it went on
        ([FIRST, dataclasses.replace(SECOND, tokens=[7])], 2),
        ([FIRST, dataclasses.replace(SECOND, told=[5])], 2),
        ([FIRST], 2),
        ([dataclasses.replace(FIRST, told=[1]), SECOND], 4),
        ([], 4),
    ],
)
def test_tokens_are_lost_from_the_first_difference_on(after: list[SampledTurn], lost: int) -> None:
    assert num_tokens_lost(kept(FIRST, SECOND), kept(*after)) == lost
