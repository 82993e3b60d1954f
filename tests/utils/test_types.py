from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from slime.utils.types import Sample

STOP = {"finish_reason": {"type": "stop"}, "weight_version": "3", "prompt_tokens": 5, "cached_tokens": 2}


def test_a_tool_call_inside_a_response_is_masked_and_kept_in_step() -> None:
    """The example of the module's docstring."""
    sample = Sample(tokens=[1, 2, 3])
    sample.append_response_tokens(tokens=[10, 11], log_probs=[-0.1, -0.2], text="ab")
    sample.append_response_tokens(tokens=[20, 21, 22], trainable=False, text="tool")
    sample.append_response_tokens(tokens=[12, 13], log_probs=[-0.3, -0.4], text="cd", meta_info=STOP)
    assert sample.tokens == [1, 2, 3, 10, 11, 20, 21, 22, 12, 13]
    assert sample.response_length == 7
    assert sample.loss_mask == [1, 1, 0, 0, 0, 1, 1]
    assert sample.rollout_log_probs == [-0.1, -0.2, 0.0, 0.0, 0.0, -0.3, -0.4]
    assert sample.response == "abtoolcd"
    assert sample.effective_response_length == 4
    assert sample.status is Sample.Status.COMPLETED
    assert sample.weight_versions == ["3"]
    assert (sample.prefix_cache_info.cached_tokens, sample.prefix_cache_info.total_prompt_tokens) == (2, 5)
    sample.check()


def test_versions_within_one_response_are_all_kept() -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 2}]
    sample = Sample(tokens=[1])
    sample.append_response_tokens(tokens=[10, 11], meta_info=STOP | {"weight_version": "5", "weight_versions": spans})
    assert sample.weight_versions == ["3", "5"]
    assert sample.oldest_weight_version == 3
    assert Sample(weight_versions=["default"]).oldest_weight_version is None


def test_a_tool_may_speak_first() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(tokens=[20], trainable=False)
    sample.append_response_tokens(tokens=[10], log_probs=[-0.5])
    assert sample.loss_mask == [0, 1]
    assert sample.rollout_log_probs == [0.0, -0.5]


def test_without_log_probs_there_are_none_and_the_mask_still_follows() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(tokens=[10, 11])
    sample.append_response_tokens(tokens=[20], trainable=False)
    sample.append_response_tokens(tokens=[12])
    assert sample.rollout_log_probs is None
    assert sample.loss_mask == [1, 1, 0, 1]
    sample.check()


def test_log_probs_that_do_not_match_are_refused() -> None:
    sample = Sample(tokens=[1])
    with pytest.raises(ValueError, match="2 tokens but 1 log-probs"):
        sample.append_response_tokens(tokens=[1, 2], log_probs=[0.0])
    sample.append_response_tokens(tokens=[10], log_probs=[-0.5])
    with pytest.raises(ValueError, match="earlier turns carry log-probs, these sampled tokens do not"):
        sample.append_response_tokens(tokens=[11])
    assert sample.tokens == [1, 10]


def test_appending_does_not_change_lists_that_other_samples_share() -> None:
    tokens = [1, 2]
    first, second = Sample(tokens=tokens), Sample(tokens=tokens)
    first.append_response_tokens(tokens=[3], log_probs=[0.0])
    assert second.tokens == tokens == [1, 2]


@pytest.mark.parametrize(("reason", "status"), [("stop", "completed"), ("length", "truncated"), ("abort", "aborted")])
def test_the_finish_reason_becomes_the_status(reason: str, status: str) -> None:
    sample = Sample()
    sample.update_from_meta_info(None, {"finish_reason": {"type": reason}})
    assert sample.status == status


@pytest.mark.parametrize(("reason", "status"), [("stop", "completed"), ("length", "truncated"), ("abort", "aborted")])
def test_a_generation_function_may_say_how_the_response_ended_in_two_flags(reason: str, status: str) -> None:
    sample = Sample()
    sample.truncated = reason == "length"
    sample.aborted = reason == "abort"
    assert sample.status == status
    assert (sample.truncated, sample.aborted) == (status == "truncated", status == "aborted")


def test_a_sample_that_failed_stays_so_whatever_else_it_is_not() -> None:
    sample = Sample(status=Sample.Status.FAILED)
    sample.truncated = sample.aborted = False
    assert sample.status is Sample.Status.FAILED


def test_a_finish_reason_that_is_not_known_fails_the_sample() -> None:
    sample = Sample()
    sample.update_from_meta_info(None, {"finish_reason": {"type": "tea_break"}})
    assert sample.status is Sample.Status.FAILED
    assert "'tea_break'" in sample.metadata["failure"]


def test_an_inner_turn_does_not_end_the_sample() -> None:
    sample = Sample(tokens=[1])
    sample.append_response_tokens(tokens=[2], meta_info=STOP, update_terminal_info=False)
    assert sample.status is Sample.Status.PENDING
    assert sample.weight_versions == ["3"]


def test_a_dict_of_a_sample_is_json_and_comes_back_with_what_plugins_added() -> None:
    sample = Sample(group_index=1, index=2, prompt=[{"role": "user", "content": "x"}], tokens=[1, 2], response_length=1)
    sample.update_from_meta_info(None, STOP | {"spec_verify_ct": 4})
    sample.my_own = {"a": 1}  # type: ignore[attr-defined]
    again = Sample.from_dict(json.loads(json.dumps(sample.to_dict())))
    assert again.to_dict() == sample.to_dict()
    assert again.status is Sample.Status.COMPLETED
    assert again.spec_info.spec_verify_ct == 4
    assert again.my_own == {"a": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("reward", "key", "expected"),
    [(1, None, 1.0), (0.5, "score", 0.5), ({"score": 2, "acc": 1}, "score", 2.0)],
)
def test_the_scalar_reward(reward: Any, key: str | None, expected: float) -> None:
    assert Sample(reward=reward).get_reward_value(SimpleNamespace(reward_key=key)) == expected


@pytest.mark.parametrize(
    ("reward", "key", "message"),
    [
        (None, None, "sample 3 has no reward"),
        ({"score": 2}, None, r"keys \['score'\]. Name the one to train on with --reward-key"),
        ({"score": None}, "score", "sample 3 has no reward"),
        ({"pred": "a=3"}, "pred", "the reward of sample 3 is 'a=3', not a number"),
        ([1.0, 2.0], None, r"the reward of sample 3 is \[1.0, 2.0\], not a number"),
        ({"score": 2}, "acc", r"--reward-key 'acc' is not among the reward's keys \['score'\]"),
    ],
)
def test_a_reward_that_is_no_number_says_what_to_do(reward: Any, key: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(index=3, reward=reward).get_reward_value(SimpleNamespace(reward_key=key))


def test_evaluation_has_a_key_of_its_own() -> None:
    args = SimpleNamespace(reward_key="score", eval_reward_key="acc")
    assert Sample(reward={"score": -1.0, "acc": True}).get_reward_value(args, evaluation=True) == 1.0
    with pytest.raises(ValueError, match="--eval-reward-key 'acc' is not among"):
        Sample(reward={"score": -1.0}).get_reward_value(args, evaluation=True)
