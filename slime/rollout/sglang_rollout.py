"""The default rollout: prompts to scored samples, asyncio over any engine that speaks SGLang's protocol.

Each piece may be called by a plug-in: `generate` (one request), `generate_and_rm` (and its reward),
`generate_and_rm_group` (a prompt's samples), `generate_rollout` (a batch of prompts), `eval_rollout`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import anyio

from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.data_source import DataSource
from slime.rollout.eval_data import EvalSet, eval_groups, eval_sets
from slime.rollout.rm_hub import RewardError, async_rm, batched_async_rm
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.async_utils import run
from slime.utils.http_utils import HTTPError, post
from slime.utils.misc import load_function, rare_garbage_collection
from slime.utils.types import Sample, SampleStatus

logger = logging.getLogger(__name__)

SamplingParams = dict[str, Any]


class RolloutFailed(RuntimeError):
    """More samples failed than --max-failed-fraction allows."""


class GenerateState:
    """What the requests of one rollout share: tokenizer, sampling parameters, the count of failures and the first."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.tokenizer = tokenizer_of(args)
        self.sampling_params: SamplingParams = {
            "temperature": args.rollout_temperature,
            "top_p": args.rollout_top_p,
            "top_k": args.rollout_top_k,
            "max_new_tokens": args.rollout_max_response_len,
            "stop": args.rollout_stop,
            "stop_token_ids": args.rollout_stop_token_ids,
            "skip_special_tokens": args.rollout_skip_special_tokens,
        }
        self.num_failed = 0
        self.first_failure = ""

    @property
    def semaphore(self) -> anyio.Semaphore:
        """The bound on requests in flight: one for all that run in this event loop, evaluation sets included."""
        num_engines = max(1, (self.args.rollout_num_gpus or 0) // self.args.rollout_num_gpus_per_engine)
        return _semaphore(self.args.sglang_server_concurrency * num_engines, asyncio.get_running_loop())

    def count_failure(self, sample: Sample) -> None:
        """Count a FAILED sample; the reason of the first is kept."""
        reason = sample.metadata.get("failure", "no reason given")
        self.num_failed += 1
        self.first_failure = self.first_failure or reason
        logger.warning("sample %s failed: %s", sample.index, reason)


@functools.lru_cache(maxsize=8)
def _semaphore(bound: int, loop: asyncio.AbstractEventLoop) -> anyio.Semaphore:
    return anyio.Semaphore(bound, fast_acquire=True)


def get_model_url(args: Any, model_name: str = "actor", endpoint: str = "/generate") -> str:
    """The router's address for `endpoint`."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"


def sampling_seed(rollout_seed: int, sample_index: int | None, num_tokens: int) -> int:
    """The seed of one request: a function of the run's seed, the sample and how far it has come, on any machine."""
    digest = hashlib.blake2b(f"{rollout_seed}/{sample_index}/{num_tokens}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


async def generate(args: Any, sample: Sample, sampling_params: SamplingParams, *, evaluation: bool = False) -> Sample:
    """Sample one response and record it in `sample`: tokens, log-probs, text, status, weight version.

    Token in, token out: what the engine sampled is kept, no text is tokenised again. A response that has reached the
    context is TRUNCATED, a prompt that leaves no room for one FAILED. Raises HTTPError.
    """
    if not sample.tokens:
        sample.tokens = encode_prompt(tokenizer_of(args), sample)
    context = args.eval_max_context_len if evaluation else args.rollout_max_context_len
    params = dict(sampling_params, max_new_tokens=_token_budget(sample, sampling_params["max_new_tokens"], context))
    if params["max_new_tokens"] <= 0:
        return _without_room(sample, context)
    params["sampling_seed"] = sampling_seed(args.rollout_seed, sample.index, len(sample.tokens))
    output = await post(
        get_model_url(args),
        {"input_ids": sample.tokens, "sampling_params": params, "return_logprob": True},
        timeout_s=args.sglang_router_request_timeout_secs,
        headers=_headers(args, sample),
    )
    meta_info = output["meta_info"]
    entries = meta_info["output_token_logprobs"]
    sample.append_response_tokens(
        args,
        tokens=[entry[1] for entry in entries],
        log_probs=[entry[0] for entry in entries],
        meta_info=meta_info,
        text=output["text"],
    )
    return sample


def encode_prompt(tokenizer: Any, sample: Sample) -> list[int]:
    """Token ids of the prompt. Raises ValueError for chat messages: the chat template was not applied."""
    if not isinstance(sample.prompt, str):
        raise ValueError(
            f"the prompt of sample {sample.index} is a list of chat messages: pass --apply-chat-template, "
            "or a --custom-generate-function-path that renders them"
        )
    token_ids: list[int] = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    return token_ids


def _token_budget(sample: Sample, max_new_tokens: int, context: int | None) -> int:
    """Tokens that may still be sampled: those of the response, within the context."""
    budget = max_new_tokens - sample.response_length
    return budget if context is None else min(budget, context - len(sample.tokens))


def _without_room(sample: Sample, context: int | None) -> Sample:
    if sample.response_length > 0:
        sample.status = SampleStatus.TRUNCATED
    else:
        sample.status = SampleStatus.FAILED
        sample.metadata["failure"] = (
            f"the prompt of sample {sample.index} has {len(sample.tokens)} tokens, which leaves no room for a response "
            f"in a context of {context}. Leave such prompts out with --rollout-max-prompt-len."
        )
    return sample


def _headers(args: Any, sample: Sample) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {args.sglang_api_key}"} if args.sglang_api_key else {}
    if sample.session_id is not None:
        headers["X-SMG-Routing-Key"] = sample.session_id
    return headers


async def generate_and_rm(
    args: Any,
    sample: Sample,
    sampling_params: SamplingParams,
    evaluation: bool = False,
    *,
    state: GenerateState | None = None,
) -> Sample | list[Sample]:
    """Generate with the function that the sample or the settings name, then score, unless the group is scored as one.

    A failure of either leaves the sample FAILED with its reason in `metadata["failure"]`.
    """
    state = state or GenerateState(args)
    try:
        async with state.semaphore:
            output = await _generate(args, sample, sampling_params, evaluation)
        if not args.group_rm:
            await _score(args, output)
    except (HTTPError, RewardError) as error:
        _mark_failed(sample, error)
        output = sample
    _count_failures(state, output)
    return output


async def _generate(
    args: Any, sample: Sample, sampling_params: SamplingParams, evaluation: bool
) -> Sample | list[Sample]:
    path = sample.generate_function_path or args.custom_generate_function_path
    if path is None:
        return await generate(args, sample, sampling_params, evaluation=evaluation)
    function, takes_evaluation = _custom_generate(path)
    extra = {"evaluation": evaluation} if takes_evaluation else {}
    output: Sample | list[Sample] = await function(args, sample, sampling_params, **extra)
    if isinstance(output, list):
        for member in output:
            member.rollout_id = sample.index
    return output


@functools.lru_cache(maxsize=64)
def _custom_generate(path: str) -> tuple[Callable[..., Any], bool]:
    function = load_function(path)
    return function, "evaluation" in inspect.signature(function).parameters


async def _score(args: Any, output: Sample | list[Sample]) -> None:
    if isinstance(output, list):
        await asyncio.gather(*(_score_one(args, sample) for sample in output))
    else:
        await _score_one(args, output)


async def _score_one(args: Any, sample: Sample) -> None:
    if sample.reward is None and sample.status not in (SampleStatus.ABORTED, SampleStatus.FAILED):
        sample.reward = await async_rm(args, sample)


def _mark_failed(sample: Sample, error: Exception) -> None:
    sample.status = SampleStatus.FAILED
    sample.metadata["failure"] = str(error)


def _count_failures(state: GenerateState, output: Sample | list[Sample]) -> None:
    for sample in output if isinstance(output, list) else [output]:
        if sample.status is SampleStatus.FAILED:
            state.count_failure(sample)


async def generate_and_rm_group(
    args: Any,
    group: list[Sample],
    sampling_params: SamplingParams,
    evaluation: bool = False,
    *,
    state: GenerateState | None = None,
) -> list[Sample]:
    """The samples of one prompt, generated at once; with --group-rm scored in one call."""
    state = state or GenerateState(args)
    if group and isinstance(group[0].prompt, str) and not group[0].tokens:
        prompt_ids = encode_prompt(state.tokenizer, group[0])
        for sample in group:
            if sample.prompt == group[0].prompt:
                sample.tokens = list(prompt_ids)
    outputs = await asyncio.gather(
        *(generate_and_rm(args, sample, sampling_params, evaluation, state=state) for sample in group)
    )
    samples = [member for output in outputs for member in (output if isinstance(output, list) else [output])]
    if args.group_rm:
        await _score_group(args, samples, state)
    return samples


async def _score_group(args: Any, samples: list[Sample], state: GenerateState) -> None:
    finished = [sample for sample in samples if sample.status not in (SampleStatus.ABORTED, SampleStatus.FAILED)]
    try:
        rewards = await batched_async_rm(args, finished)
    except RewardError as error:
        for sample in finished:
            _mark_failed(sample, error)
        _count_failures(state, finished)
        return
    for sample, reward in zip(finished, rewards, strict=True):
        sample.reward = reward


def generate_rollout(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """One rollout of `rollout_batch_size` prompts, or one evaluation. The function behind --rollout-function-path.

    Raises RolloutFailed where more samples failed than allowed.
    """
    with rare_garbage_collection():
        if evaluation:
            return run(eval_rollout(args, rollout_id))
        return run(_train_rollout(args, rollout_id, data_source))


async def _train_rollout(args: Any, rollout_id: int, data_source: DataSource) -> RolloutFnTrainOutput:
    state = GenerateState(args)
    groups = data_source.get_samples(args.rollout_batch_size)
    finished = await _run_groups(args, groups, state.sampling_params, state, evaluation=False)
    kept = [[sample for sample in group if sample.status is not SampleStatus.FAILED] for group in finished]
    num_samples = max(1, sum(map(len, finished)))
    metrics = {"rollout/failed": state.num_failed / num_samples, "rollout/num_failed": state.num_failed}
    return RolloutFnTrainOutput([group for group in kept if group], metrics)


async def eval_rollout(args: Any, rollout_id: int) -> RolloutFnEvalOutput:
    """Sample and score every evaluation set. `data`: {name: {"rewards", "truncated", "samples"}}, in file order.

    A sample that failed stays, with reward NaN. Each set may lose --max-failed-fraction of its samples.
    """
    results = await asyncio.gather(*(_eval_set(dataset) for dataset in eval_sets(args)))
    return RolloutFnEvalOutput(dict(results))


async def _eval_set(dataset: EvalSet) -> tuple[str, dict[str, Any]]:
    args = dataset.args
    state = GenerateState(args)
    params = state.sampling_params | dataset.sampling_params
    groups = await _run_groups(args, eval_groups(dataset), params, state, evaluation=True)
    samples = [sample for group in groups for sample in group]
    return dataset.name, {
        "rewards": [
            math.nan if sample.status is SampleStatus.FAILED else sample.get_reward_value(args, evaluation=True)
            for sample in samples
        ],
        "truncated": [sample.status is SampleStatus.TRUNCATED for sample in samples],
        "samples": samples,
    }


async def _run_groups(
    args: Any, groups: Sequence[list[Sample]], params: SamplingParams, state: GenerateState, *, evaluation: bool
) -> list[list[Sample]]:
    """Every group, in the order given. Ends at once, the rest cancelled, when too many samples have failed."""
    num_samples = sum(map(len, groups))
    allowed = args.max_failed_fraction * num_samples
    tasks = [
        asyncio.create_task(generate_and_rm_group(args, group, params, evaluation, state=state)) for group in groups
    ]
    try:
        for task in asyncio.as_completed(tasks):
            await task
            if state.num_failed > allowed:
                raise RolloutFailed(
                    f"{state.num_failed} of {num_samples} samples failed, --max-failed-fraction allows "
                    f"{args.max_failed_fraction:g}; the first: {state.first_failure}"
                )
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
