"""Reward functions written for TRL, verl and verifiers, used as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import make_tiny_model

from slime.rollout.rm_hub import RewardError, async_rm, batched_async_rm
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.types import Sample


@dataclass(frozen=True)
class RewardArgs:
    custom_rm_path: str
    custom_rm_style: str
    group_rm: bool = False
    apply_chat_template: bool = False
    label_key: str | None = "answer"
    rm_timeout_s: float = 60.0
    rm_num_workers: int | None = 2
    rollout_skip_special_tokens: bool = True
    hf_checkpoint: str = ""
    trust_remote_code: bool = False


def settings(name: str, style: str, **fields: Any) -> RewardArgs:
    return RewardArgs(f"{__name__}.{name}", style, **fields)


# --- TRL


def closeness(prompts, completions, completion_ids, name, answer, **kwargs):
    """Takes columns of the data by name, one of them called like a parameter of ours."""
    assert len(prompts) == len(name) and completion_ids == [[5, 6]] * len(prompts)
    return [-float(abs(int(text) - int(right))) for text, right in zip(completions, answer, strict=True)]


def chat_length(prompts, completions, **kwargs):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(len(completion[0]["content"])) for completion in completions]


async def async_none_but_first(prompts, completions, **kwargs):
    return [2.0] + [None] * (len(prompts) - 1)


def too_few(completions, **kwargs):
    return [1.0][len(completions) :]


def trl_sample(response: str, **fields: Any) -> Sample:
    values: dict[str, Any] = {"prompt": "3+4=?", "label": "7", "metadata": {"name": "sums"}} | fields
    return Sample(index=7, response=response, tokens=[1, 5, 6], response_length=2, **values)


def test_a_trl_function_gets_columns_by_their_names() -> None:
    args = settings("closeness", "trl")
    assert run(async_rm(args, trl_sample("9"))) == -2.0
    assert run(batched_async_rm(args, [trl_sample("9"), trl_sample("7")])) == [-2.0, 0.0]


def test_a_trl_function_gets_the_whole_group_with_group_rm_and_none_counts_as_zero() -> None:
    args = settings("async_none_but_first", "trl", group_rm=True)
    assert run(batched_async_rm(args, [trl_sample("a"), trl_sample("b"), trl_sample("c")])) == [2.0, 0.0, 0.0]


@pytest.mark.parametrize("prompt", ["<user>3+4=?", [{"role": "user", "content": "3+4=?"}]])
def test_a_trl_function_gets_messages_where_the_data_holds_conversations(prompt: Any) -> None:
    args = settings("chat_length", "trl", apply_chat_template=isinstance(prompt, str))
    assert run(async_rm(args, trl_sample("four", prompt=prompt))) == 4.0


def test_a_trl_function_with_too_few_rewards_fails_the_sample() -> None:
    with pytest.raises(RewardError, match=r"too_few, sample 7: must return a list of 1 rewards, got \[\]"):
        run(async_rm(settings("too_few", "trl"), trl_sample("9")))


def test_special_tokens_do_not_reach_functions_of_other_libraries(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", max_position_embeddings=32)
    args = settings("chat_length", "trl", apply_chat_template=True, rollout_skip_special_tokens=False)
    args = RewardArgs(**{**vars(args), "hf_checkpoint": str(model)})
    tokenizer = tokenizer_of(args)
    response = [*tokenizer("34", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    sample = Sample(prompt="p", response="34<eos>", tokens=[1, *response], response_length=len(response))
    assert run(async_rm(args, sample)) == 2.0


# --- verl


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "openai/gsm8k"
    return {"score": float(ground_truth in solution_str), "split": extra_info["split"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"label": "7", "metadata": {"data_source": "openai/gsm8k", "split": "test"}},
        {
            "label": None,
            "metadata": {
                "data_source": "openai/gsm8k",
                "reward_model": {"style": "rule", "ground_truth": "7"},
                "extra_info": {"split": "test"},
            },
        },
    ],
)
def test_a_verl_function_gets_source_answer_truth_and_extra_information(fields: dict[str, Any]) -> None:
    args = settings("compute_score", "verl")
    assert run(async_rm(args, Sample(response="it is 7", **fields))) == {"score": 1.0, "split": "test"}


def test_a_verl_function_without_a_ground_truth_fails_the_sample() -> None:
    with pytest.raises(RewardError, match="compute_score, sample 7: the sample has no label"):
        run(async_rm(settings("compute_score", "verl"), Sample(index=7, response="it is 7")))


# --- verifiers


class Rubric:
    """A rubric as verifiers has it: weighted functions, whose results it writes into the state of a rollout."""

    async def score_rollout(self, state: dict[str, Any]) -> None:
        right = float(state["completion"][-1]["content"] == state["answer"])
        short = 1.0 / len(state["completion"][-1]["content"])
        state["reward"] = right + 0.5 * short
        state["metrics"] = {"right": right, "short": short}

    async def score_group(self, states: list[dict[str, Any]], score_sem: Any) -> None:
        async with score_sem:
            for place, state in enumerate(states):
                state["reward"], state["metrics"] = float(place), {}


class Environment:
    def __init__(self) -> None:
        self.rubric = Rubric()


rubric = Rubric()


def load_nothing() -> None:
    return None


def load_environment() -> Environment:
    return Environment()


@pytest.mark.parametrize("name", ["rubric", "Environment", "load_environment"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_rubric_of_an_environment_scores_and_its_metrics_are_kept(name: str, num_workers: int) -> None:
    sample = Sample(prompt="p", response="34", label="34")
    args = settings(name, "verifiers", apply_chat_template=True, rm_num_workers=num_workers)
    assert run(async_rm(args, sample)) == 1.25
    assert sample.metadata["rubric"] == {"right": 1.0, "short": 0.5}


def test_a_rubric_scores_a_group_in_one_call() -> None:
    args = settings("rubric", "verifiers", group_rm=True)
    assert run(batched_async_rm(args, [Sample(response="a"), Sample(response="b")])) == [0.0, 1.0]


def test_what_leads_to_no_rubric_is_named() -> None:
    with pytest.raises(RewardError, match="leads to nothing of verifiers that scores"):
        run(async_rm(settings("load_nothing", "verifiers"), Sample()))
