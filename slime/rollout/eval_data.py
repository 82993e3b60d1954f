"""The evaluation sets of a run: which prompts, sampled how."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

from slime.data.dataset import Dataset
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.types import Sample

# Evaluation samples are numbered from here, so that their seeds are not those of training samples.
FIRST_EVAL_INDEX = 1 << 40


@dataclass(frozen=True)
class EvalSet:
    """One named set. sampling_params: what differs from the rollout's."""

    name: str
    path: str
    n_samples_per_prompt: int
    sampling_params: dict[str, Any]


def eval_sets(args: Any) -> list[EvalSet]:
    """The sets of --eval-prompt-data, name and file in turn."""
    pairs = args.eval_prompt_data or []
    params = {
        "temperature": args.eval_temperature,
        "top_p": args.eval_top_p,
        "top_k": args.eval_top_k,
        "max_new_tokens": args.eval_max_response_len,
    }
    if args.eval_min_new_tokens is not None:
        params["min_new_tokens"] = args.eval_min_new_tokens
    return [
        EvalSet(name, path, args.n_samples_per_eval_prompt, params)
        for name, path in zip(pairs[::2], pairs[1::2], strict=True)
    ]


def eval_groups(args: Any, eval_set: EvalSet) -> list[list[Sample]]:
    """Fresh samples of every prompt, n a group, numbered the same at every evaluation."""
    groups = []
    for number, prototype in enumerate(_dataset(args, eval_set.path).samples):
        group = [copy.deepcopy(prototype) for _ in range(eval_set.n_samples_per_prompt)]
        for offset, sample in enumerate(group):
            sample.group_index = number
            sample.index = FIRST_EVAL_INDEX + number * eval_set.n_samples_per_prompt + offset
        groups.append(group)
    return groups


@functools.lru_cache(maxsize=32)
def _dataset(args: Any, path: str) -> Dataset:
    needs_tokenizer = args.apply_chat_template or args.eval_max_prompt_len is not None
    return Dataset(
        path,
        tokenizer_of(args) if needs_tokenizer else None,
        max_prompt_len=args.eval_max_prompt_len,
        input_key=args.eval_input_key,
        label_key=args.eval_label_key,
        metadata_key=args.metadata_key,
        tool_key=args.eval_tool_key,
        apply_chat_template=args.apply_chat_template,
        apply_chat_template_kwargs=args.apply_chat_template_kwargs,
    )
