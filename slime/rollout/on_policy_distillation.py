"""A teacher behind an engine's address scores the tokens that the student sampled.

    --custom-rm-path slime.rollout.on_policy_distillation.reward_func --rm-url http://TEACHER/generate
                                                          (or: a model named teacher in the file of --sglang-config)
    --advantage-estimator on_policy_distillation          (or: any estimator, with --use-opd --opd-kl-coef)

The teacher is any engine that speaks SGLang's protocol, of any size and parallelism; it must share the student's
tokenizer, which is checked on the first sample and then now and again.
"""

from __future__ import annotations

from typing import Any

from slime.rollout.rm_hub import Reward, rule_reward
from slime.rollout.sglang_rollout import get_model_url
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.http_utils import post
from slime.utils.types import Sample

TEACHER = "teacher"  # what --sglang-config calls it
CHECK_EVERY = 64  # samples of which one is checked for the tokenizer: token texts cost the teacher time


async def reward_func(args: Any, sample: Sample, **kwargs: Any) -> Reward:
    """Sets `sample.teacher_log_probs`, one a response token, at the rollout's temperature.

    Returns the reward of --rm-type, 0 without one. Raises ValueError where there is no teacher or it has another
    tokenizer, HTTPError where it does not answer.
    """
    url = _teacher_url(args)
    is_checked = (sample.index or 0) % CHECK_EVERY == 0
    answer = await post(
        url,
        {
            "input_ids": sample.tokens,
            "sampling_params": {"max_new_tokens": 0, "temperature": args.rollout_temperature},
            "return_logprob": True,
            "logprob_start_len": 0,
            "return_text_in_logprobs": is_checked,
        },
        timeout_s=args.rm_timeout_s,
        retry_for_s=args.rm_timeout_s,
    )
    entries: list[list[Any]] = answer["meta_info"]["input_token_logprobs"]
    if [entry[1] for entry in entries] != sample.tokens:
        raise ValueError(f"the teacher at {url} answered for other tokens than those of sample {sample.index}")
    if is_checked:
        _check_tokenizer(args, url, entries)
    sample.teacher_log_probs = [entry[0] for entry in entries[len(entries) - sample.response_length :]]
    return 0.0 if args.rm_type is None else await rule_reward(args, sample)


def _teacher_url(args: Any) -> str:
    if args.rm_url is not None:
        return str(args.rm_url)
    if TEACHER not in args.sglang_model_routers:
        raise ValueError(
            "slime.rollout.on_policy_distillation needs --rm-url, the teacher's /generate, or a model named "
            f"{TEACHER} in the file of --sglang-config"
        )
    return get_model_url(args, TEACHER)


def _check_tokenizer(args: Any, url: str, entries: list[list[Any]]) -> None:
    """Raises ValueError where the teacher reads a token as other text than the student's tokenizer."""
    tokenizer = tokenizer_of(args)
    for _, token_id, text in entries:
        mine = tokenizer.decode([token_id])
        if text is not None and text != mine:
            raise ValueError(
                f"the teacher at {url} has another tokenizer: token {token_id} is {text!r} to it and {mine!r} "
                f"to {args.hf_checkpoint}. On-policy distillation compares tokens; choose a teacher of the same family."
            )
