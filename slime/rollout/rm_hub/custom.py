"""Reward functions of users: of slime's own form, and those written for TRL, verl or verifiers, as they are.

--custom-rm-style says which form the function of --custom-rm-path has; every form may be async or not:

    slime      f(args, sample, **kwargs) -> float | dict          with --group-rm f(args, samples, **kwargs) -> list
    trl        f(prompts, completions, completion_ids, **columns) -> list of floats
    verl       f(data_source, solution_str, ground_truth, extra_info) -> float | dict
    verifiers  not a function but a Rubric, an Environment, a Task, a Taskset, or what returns one
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from slime.rollout.rm_hub.deadline import call_with_deadline, is_async
from slime.rollout.rm_hub.errors import RewardError, required_label
from slime.rollout.rm_hub.pool import call_in_worker, default_num_workers
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.misc import load_function
from slime.utils.types import Message, Sample

Call = Callable[..., Awaitable[Any]]  # call(path, *args, **kwargs): what the function there returns
Adapter = Callable[[Any, str, list[Sample], Call], Awaitable[Any]]


async def custom_reward(args: Any, path: str, sample: Sample, kwargs: dict[str, Any]) -> Any:
    """The reward of one sample by the function at `path`, unchecked. Raises RewardError."""
    call = partial(call_function, args, sample.index)
    if args.custom_rm_style == "slime":
        return await call(path, args, sample, **kwargs)
    rewards = _checked_list(await ADAPTERS[args.custom_rm_style](args, path, [sample], call), path, [sample])
    return rewards[0]


async def custom_rewards(args: Any, path: str, samples: list[Sample], kwargs: dict[str, Any]) -> list[Any]:
    """The rewards of a group by one call of the function at `path`, unchecked. Raises RewardError."""
    call = partial(call_function, args, samples[0].index)
    if args.custom_rm_style == "slime":
        rewards = await call(path, args, samples, **kwargs)
    else:
        rewards = await ADAPTERS[args.custom_rm_style](args, path, samples, call)
    return _checked_list(rewards, path, samples)


async def call_function(args: Any, sample_index: int | None, path: str, /, *positional: Any, **kwargs: Any) -> Any:
    """What the function at `path` returns, within --rm-timeout-s.

    An async one runs in this event loop, any other in a worker process, with --rm-num-workers 0 in a thread.
    """
    function, runs_here = _reward_function(path)
    timeout_s = args.rm_timeout_s
    if runs_here or args.rm_num_workers == 0:
        bound = partial(function, *positional, **kwargs)
        return await call_with_deadline(bound, name=path, sample_index=sample_index, timeout_s=timeout_s)
    num_workers = args.rm_num_workers or default_num_workers()
    return await call_in_worker(
        path, positional, kwargs, sample_index=sample_index, timeout_s=timeout_s, num_workers=num_workers
    )


@functools.lru_cache(maxsize=64)
def _reward_function(path: str) -> tuple[Callable[..., Any], bool]:
    """The function, and whether it is async."""
    function = load_function(path)
    return function, is_async(function)


def _checked_list(rewards: Any, path: str, samples: list[Sample]) -> list[Any]:
    if not isinstance(rewards, list | tuple) or len(rewards) != len(samples):
        reason = f"must return a list of {len(samples)} rewards, got {rewards!r:.80}"
        raise RewardError(path, samples[0].index, reason)
    return list(rewards)


async def _trl_rewards(args: Any, path: str, samples: list[Sample], call: Call) -> Any:
    """Columns are the metadata, and the label under the name that --label-key gives it. None counts as 0, as in TRL."""
    columns = {key: [sample.metadata.get(key) for sample in samples] for key in samples[0].metadata}
    if samples[0].label is not None:
        columns[(args.label_key or "label").rpartition(".")[2]] = [sample.label for sample in samples]
    rewards = await call(
        path,
        **columns,
        prompts=[_prompt(args, sample) for sample in samples],
        completions=[_completion(args, sample) for sample in samples],
        completion_ids=[_response_ids(sample) for sample in samples],
    )
    return [0.0 if reward is None else reward for reward in rewards] if isinstance(rewards, list) else rewards


async def _verl_rewards(args: Any, path: str, samples: list[Sample], call: Call) -> Any:
    """The ground truth is the label, else metadata["reward_model"]["ground_truth"]."""
    (sample,) = samples
    metadata = sample.metadata
    model = metadata.get("reward_model") or {}
    truth = model["ground_truth"] if sample.label is None and "ground_truth" in model else required_label(path, sample)
    reward = await call(
        path,
        data_source=metadata.get("data_source"),
        solution_str=_text(args, sample),
        ground_truth=truth,
        extra_info=metadata.get("extra_info", metadata),
    )
    return [reward]


async def _rubric_rewards(args: Any, path: str, samples: list[Sample], call: Call) -> Any:
    """The weighted sum; the value of each function is left in metadata["rubric"].

    Data of a Task are made of the metadata, and the label as "answer" and under the name that --label-key gives it.
    """
    label_name = (args.label_key or "answer").rpartition(".")[2]
    states = [
        {
            "prompt": _prompt(args, sample),
            "completion": _completion(args, sample),
            "answer": sample.label or "",
            "info": sample.metadata.get("info", {}),
            "task": sample.metadata.get("task", "default"),
            "columns": {**sample.metadata, **({} if sample.label is None else {label_name: sample.label})},
        }
        for sample in samples
    ]
    scores = await call("slime.rollout.rm_hub.rubric.score", path, states, as_group=args.group_rm)
    for sample, (_, metrics) in zip(samples, scores, strict=True):
        sample.metadata["rubric"] = metrics
    return [reward for reward, _ in scores]


ADAPTERS: dict[str, Adapter] = {"trl": _trl_rewards, "verl": _verl_rewards, "verifiers": _rubric_rewards}


def _is_chat(args: Any, sample: Sample) -> bool:
    """Whether functions get messages: as in TRL where the data holds conversations, to which a template is applied."""
    return args.apply_chat_template or not isinstance(sample.prompt, str)


def _prompt(args: Any, sample: Sample) -> str | list[Message]:
    """The prompt. Of a rendered conversation the one message that there is holds all its text."""
    if isinstance(sample.prompt, str) and _is_chat(args, sample):
        return [{"role": "user", "content": sample.prompt}]
    return sample.prompt


def _completion(args: Any, sample: Sample) -> str | list[Message]:
    text = _text(args, sample)
    return [{"role": "assistant", "content": text}] if _is_chat(args, sample) else text


def _text(args: Any, sample: Sample) -> str:
    """The response without special tokens, as TRL and verl have it."""
    if args.rollout_skip_special_tokens or not _response_ids(sample):
        return sample.response
    return str(tokenizer_of(args).decode(_response_ids(sample), skip_special_tokens=True))


def _response_ids(sample: Sample) -> list[int]:
    return sample.tokens[len(sample.tokens) - sample.response_length :]
