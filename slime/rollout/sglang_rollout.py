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
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from slime.config.served_models import POLICY
from slime.rollout.abort import abort
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from slime.rollout.collect import collect_groups
from slime.rollout.data_source import DataSource
from slime.rollout.eval_data import EvalSet, eval_groups, eval_sets
from slime.rollout.hooks import filter_samples, process_all_samples, run_sample_hooks
from slime.rollout.rm_hub import RewardError, async_rm, batched_async_rm
from slime.rollout.routed_experts import generate_with_experts, read_experts, without_unrouted
from slime.rollout.state import GenerateState, RolloutFailed, SamplingParams, rare_collection
from slime.rollout.tokenizer import tokenizer_of
from slime.rollout.turns import back_to_last_turn, num_tokens_lost
from slime.utils.async_utils import run
from slime.utils.http_utils import HTTPError, post
from slime.utils.misc import load_function
from slime.utils.types import Sample, SampleStatus

__all__ = [
    "GenerateState",
    "RolloutFailed",
    "abort",
    "encode_prompt",
    "eval_rollout",
    "generate",
    "generate_and_rm",
    "generate_and_rm_group",
    "generate_rollout",
    "get_model_url",
    "sampling_seed",
]

logger = logging.getLogger(__name__)

# A sample in one of these is not generated again.
GENERATED = (SampleStatus.COMPLETED, SampleStatus.TRUNCATED, SampleStatus.FAILED)
UNSCORED = (SampleStatus.ABORTED, SampleStatus.FAILED)
MAX_INTERRUPTIONS = 16  # of one sample, by somebody else who ends requests at the engines


class GenerationError(RuntimeError):
    """A user's generation function raised; the run may go on without this sample."""


def get_model_url(args: Any, model_name: str = "actor", endpoint: str = "/generate") -> str:
    """The address for `endpoint` of a model's router: "actor" is the policy, others are those of --sglang-config.

    Raises ValueError for a model that is not served.
    """
    if model_name == POLICY:
        return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"
    routers: dict[str, tuple[str, int]] = args.sglang_model_routers
    if model_name not in routers:
        raise ValueError(f"no model {model_name!r} is served, there are {', '.join(routers)}: see --sglang-config")
    host, port = routers[model_name]
    return f"http://{host}:{port}{endpoint}"


def sampling_seed(rollout_seed: int, sample_index: int | str | None, num_tokens: int) -> int:
    """The seed of one request: a function of the run's seed, the sample and how far it has come, on any machine."""
    digest = hashlib.blake2b(f"{rollout_seed}/{sample_index}/{num_tokens}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


async def generate(args: Any, sample: Sample, sampling_params: SamplingParams, *, evaluation: bool = False) -> Sample:
    """Sample one response, or the rest of one, and record it in `sample`: tokens, log-probs, text, status, version.

    Token in, token out: what the engine sampled is kept, no text is tokenised again. A response that has reached the
    context is TRUNCATED, a prompt that leaves no room for one FAILED. The seed, unless `sampling_params` has one,
    follows from --rollout-seed, the sample's index and how far it has come. Raises HTTPError.
    """
    tokenizer = tokenizer_of(args)
    if not sample.tokens:
        sample.tokens, sample.rollout_routed_experts = encode_prompt(tokenizer, sample), None
    context = args.eval_max_context_len if evaluation else args.rollout_max_context_len
    params = _remaining(sample, sampling_params, context)
    if params["max_new_tokens"] <= 0:
        return _without_room(sample, context)
    params.setdefault("sampling_seed", sampling_seed(args.rollout_seed, sample.index, len(sample.tokens)))
    payload = {"input_ids": sample.tokens, "sampling_params": params, "return_logprob": True}
    segment = await _sampled(args, sample, payload, evaluation=evaluation)
    is_continued = sample.status is SampleStatus.ABORTED and sample.response_length > 0
    sample.append_response_tokens(args, **segment)
    if is_continued:
        skip = bool(params["skip_special_tokens"])
        response = sample.tokens[-sample.response_length :]
        sample.response = whole_text(tokenizer, response, len(segment["tokens"]), segment["text"], skip=skip)
    return sample


async def _sampled(args: Any, sample: Sample, payload: dict[str, Any], *, evaluation: bool) -> dict[str, Any]:
    """What an engine adds to `sample`, as `append_response_tokens` takes it. Raises HTTPError."""
    url, headers = get_model_url(args), _headers(args, sample)
    if not args.use_rollout_routing_replay or evaluation:
        output = await post(url, payload, timeout_s=args.sglang_router_request_timeout_secs, headers=headers)
        return _segment(output, url)
    output = await generate_with_experts(args, sample, payload, headers=headers)
    segment = _segment(without_unrouted(output), url)
    if segment["tokens"]:
        segment["routed_experts"] = read_experts(args, sample, segment["meta_info"], len(segment["tokens"]))
    return segment


def _segment(output: Any, url: str) -> dict[str, Any]:
    """What `append_response_tokens` takes, from an engine's answer. Raises HTTPError where that is malformed."""
    try:
        meta_info = output["meta_info"]
        entries = meta_info["output_token_logprobs"]
        tokens, log_probs = [int(entry[1]) for entry in entries], [float(entry[0]) for entry in entries]
        reason, text = meta_info["finish_reason"]["type"], str(output["text"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise HTTPError(f"POST {url} answered what is not a generation ({error!r}): {output!r:.200}", None) from error
    if reason == "abort" and not tokens:  # ended while it waited: no version sampled anything
        meta_info = {key: value for key, value in meta_info.items() if not key.startswith("weight_version")}
    return {"tokens": tokens, "log_probs": log_probs, "meta_info": meta_info, "text": text}


def whole_text(tokenizer: Any, token_ids: list[int], num_new: int, new_text: str, *, skip: bool) -> str:
    """The text of several segments, decoded at once: characters may lie across their border.

    num_new, new_text: tokens of the last segment, and its text without what the engine took off, such as a stop string.
    """
    new_alone = tokenizer.decode(token_ids[len(token_ids) - num_new :], skip_special_tokens=skip)
    whole: str = tokenizer.decode(token_ids, skip_special_tokens=skip)
    return whole[: len(whole) - max(0, len(new_alone) - len(new_text))]


def encode_prompt(tokenizer: Any, sample: Sample) -> list[int]:
    """Token ids of the prompt. Raises ValueError for chat messages: the chat template was not applied."""
    if not isinstance(sample.prompt, str):
        raise ValueError(
            f"the prompt of sample {sample.index} is a list of chat messages: pass --apply-chat-template, "
            "or a --custom-generate-function-path that renders them"
        )
    token_ids: list[int] = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    return token_ids


def _remaining(sample: Sample, sampling_params: SamplingParams, context: int | None) -> SamplingParams:
    """`sampling_params` less what the response has already, within the context."""
    budget = sampling_params["max_new_tokens"] - sample.response_length
    params = dict(sampling_params)
    params["max_new_tokens"] = budget if context is None else min(budget, context - len(sample.tokens))
    if sample.response_length and params.get("min_new_tokens"):
        params["min_new_tokens"] = max(0, params["min_new_tokens"] - sample.response_length)
    return params


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

    A failure of either leaves the sample FAILED with its reason in `metadata["failure"]`. What a sample has
    already, its whole response or its reward, is not done again. After `abort` it is ABORTED, or finished without a
    reward.
    """
    state = state or GenerateState(args)
    if sample.status is SampleStatus.FAILED or (sample.status in GENERATED and sample.reward is not None):
        return sample
    try:
        output = await _generate_unless_aborted(args, sample, sampling_params, evaluation, state=state)
        if not args.group_rm and not state.is_aborted:
            with state.interruptible(state.scoring):
                await _score(args, output)
    except (HTTPError, RewardError, GenerationError) as error:
        if isinstance(error, GenerationError) and state.num_failed == 0:
            logger.warning("the first sample that failed:", exc_info=error)
        _mark_failed(sample, error)
        output = sample
    _count_failures(state, output)
    return output if args.group_rm else await _hooked(args, output, state, evaluation)


async def _generate_unless_aborted(
    args: Any, sample: Sample, sampling_params: SamplingParams, evaluation: bool, *, state: GenerateState
) -> Sample | list[Sample]:
    """What generation makes of `sample`; after `abort` it is ABORTED, with its tokens if it was generating."""
    if sample.status in GENERATED:
        return sample
    num_prompt_tokens, rollout_id = len(sample.tokens) - sample.response_length, sample.rollout_id
    turns = sample.turns
    with state.interruptible(state.generating):
        async with state.semaphore:
            if state.is_aborted:
                sample.status = SampleStatus.ABORTED
                return sample
            return await _generate_to_its_end(args, sample, sampling_params, evaluation, state=state)
    num_sampled = sample.effective_response_length
    _back_to_prompt(sample, num_prompt_tokens, rollout_id)
    if sample.turns:
        back_to_last_turn(sample)
    num_cut = max(0, num_sampled - sample.effective_response_length)
    state.num_lost_tokens += num_cut + num_tokens_lost(turns, sample.turns)
    return sample


async def _generate_to_its_end(
    args: Any, sample: Sample, sampling_params: SamplingParams, evaluation: bool, *, state: GenerateState
) -> Sample | list[Sample]:
    """What generation makes of `sample`, continued where it was interrupted though nobody here called `abort`.

    Where one of several samples is ABORTED none is kept: it is `sample`, ABORTED, and starts over.
    """
    num_prompt_tokens, rollout_id = len(sample.tokens) - sample.response_length, sample.rollout_id
    for _ in range(MAX_INTERRUPTIONS):
        turns = sample.turns
        output = await _generate(args, sample, sampling_params, evaluation)
        if isinstance(output, list) and any(member.status is SampleStatus.ABORTED for member in output):
            state.num_lost_tokens += sum(member.effective_response_length for member in output)
            output, sample.turns = _back_to_prompt(sample, num_prompt_tokens, rollout_id), []
        members = output if isinstance(output, list) else [output]
        state.num_lost_tokens += num_tokens_lost(turns, members[0].turns if members else [])
        if isinstance(output, list) or output.status is not SampleStatus.ABORTED:
            for member in members:
                member.turns = []
            return output
        if state.is_aborted:
            return output
        sample = output
    raise HTTPError(f"somebody ended the request at the engine {MAX_INTERRUPTIONS} times", None)


def _back_to_prompt(sample: Sample, num_prompt_tokens: int, rollout_id: int | None) -> Sample:
    """`sample` as it was before anything was generated, to start over."""
    sample.tokens = sample.tokens[:num_prompt_tokens]
    sample.response, sample.response_length = "", 0
    sample.loss_mask = sample.rollout_log_probs = sample.reward = None
    sample.weight_versions, sample.rollout_routed_experts = [], None
    sample.rollout_id = rollout_id
    sample.status = SampleStatus.ABORTED
    return sample


async def _hooked(
    args: Any, output: Sample | list[Sample], state: GenerateState, evaluation: bool
) -> Sample | list[Sample]:
    """--rollout-sample-hook-path, for what has a reward."""
    if not args.rollout_sample_hook_path:
        return output
    if isinstance(output, list):
        return [await _hook_one(args, sample, state, evaluation) for sample in output]
    return await _hook_one(args, output, state, evaluation)


async def _hook_one(args: Any, sample: Sample, state: GenerateState, evaluation: bool) -> Sample:
    if sample.reward is None or sample.status in UNSCORED:
        return sample
    with state.interruptible(state.generating):
        return await run_sample_hooks(args, sample, rollout_id=state.rollout_id, evaluation=evaluation)
    sample.reward = None  # to be scored, and seen by the hooks, later
    return sample


async def _generate(
    args: Any, sample: Sample, sampling_params: SamplingParams, evaluation: bool
) -> Sample | list[Sample]:
    path = sample.generate_function_path or args.custom_generate_function_path
    if path is None:
        return await generate(args, sample, sampling_params, evaluation=evaluation)
    function, takes_evaluation = _custom_generate(path)
    extra = {"evaluation": evaluation} if takes_evaluation else {}
    try:
        output = function(args, sample, sampling_params, **extra)
        output = await output if inspect.isawaitable(output) else output
    except HTTPError:
        raise
    except Exception as error:  # the function is the user's and may raise anything; it fails its sample, by name
        raise GenerationError(
            f"generation {path}, sample {sample.index}: raised {type(error).__name__}: {error}"
        ) from error
    return _checked_output(output, path, sample)


def _checked_output(output: Any, path: str, sample: Sample) -> Sample | list[Sample]:
    """What a generation function returned, siblings marked as such. Raises ValueError where that is something else."""
    if isinstance(output, Sample):
        return output
    if not isinstance(output, list) or not all(isinstance(member, Sample) for member in output):
        raise ValueError(
            f"--custom-generate-function-path: {path} must return a Sample or a list of Samples, got {output!r:.80}"
        )
    siblings: list[Sample] = output
    for member in siblings:
        member.rollout_id = sample.index
    return siblings


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
    if sample.reward is None and sample.status not in UNSCORED:
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
            if sample.prompt == group[0].prompt and not sample.tokens:
                sample.tokens = list(prompt_ids)
    outputs = await asyncio.gather(
        *(generate_and_rm(args, sample, sampling_params, evaluation, state=state) for sample in group)
    )
    samples = [member for output in outputs for member in (output if isinstance(output, list) else [output])]
    if args.group_rm and not state.is_aborted and any(sample.reward is None for sample in samples):
        with state.interruptible(state.scoring):
            await _score_group(args, samples, state)
        samples = [await _hook_one(args, sample, state, evaluation) for sample in samples]
    return samples


async def _score_group(args: Any, samples: list[Sample], state: GenerateState) -> None:
    finished = [sample for sample in samples if sample.status not in UNSCORED]
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
    with rare_collection(args):
        if evaluation:
            return run(eval_rollout(args, rollout_id))
        return run(_train_rollout(args, rollout_id, data_source))


async def _train_rollout(args: Any, rollout_id: int, data_source: DataSource) -> RolloutFnTrainOutput:
    state = GenerateState(args, rollout_id)

    def run_group(group: list[Sample]) -> Coroutine[Any, Any, list[Sample]]:
        return generate_and_rm_group(args, group, state.sampling_params, state=state)

    collected = await collect_groups(args, data_source, state, run_group)
    filter_samples(args, collected.kept)
    process_all_samples(args, collected.finished, data_source)
    return RolloutFnTrainOutput(collected.kept, collected.metrics)


async def eval_rollout(args: Any, rollout_id: int) -> RolloutFnEvalOutput:
    """Sample and score every evaluation set. `data`: {name: {"rewards", "truncated", "samples"}}, in file order.

    A sample that failed stays, with reward NaN. Each set may lose --max-failed-fraction of its samples.
    """
    results = await asyncio.gather(*(_eval_set(dataset, rollout_id) for dataset in eval_sets(args)))
    return RolloutFnEvalOutput(dict(results))


async def _eval_set(dataset: EvalSet, rollout_id: int) -> tuple[str, dict[str, Any]]:
    args = dataset.args
    state = GenerateState(args, rollout_id)
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
