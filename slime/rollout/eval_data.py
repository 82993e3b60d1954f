"""The evaluation sets of a run: which prompts, sampled and scored how."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slime.config.base import ConfigError
from slime.config.flags import check_value, settings_of
from slime.config.run import GROUPS
from slime.data.dataset import Dataset
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.eval_config import EvalDatasetConfig, read_eval_config
from slime.utils.types import Sample

# Evaluation samples are numbered from here, so that their seeds are not those of training samples.
FIRST_EVAL_INDEX = 1 << 40

# A key of --eval-config and the setting that it replaces for its set.
SETTING_OF_KEY = {
    "n_samples_per_eval_prompt": "n_samples_per_eval_prompt",
    "temperature": "eval_temperature",
    "top_p": "eval_top_p",
    "top_k": "eval_top_k",
    "max_response_len": "eval_max_response_len",
    "max_prompt_len": "eval_max_prompt_len",
    "min_new_tokens": "eval_min_new_tokens",
    "stop": "rollout_stop",
    "stop_token_ids": "rollout_stop_token_ids",
    "input_key": "eval_input_key",
    "label_key": "eval_label_key",
    "tool_key": "eval_tool_key",
    "metadata_key": "metadata_key",
    "metadata_columns": "metadata_columns",
    "apply_chat_template": "apply_chat_template",
    "apply_chat_template_kwargs": "apply_chat_template_kwargs",
    "rm_type": "rm_type",
    "custom_rm_path": "custom_rm_path",
    "custom_rm_style": "custom_rm_style",
    "reward_key": "eval_reward_key",
    "custom_generate_function_path": "custom_generate_function_path",
}


@dataclass(frozen=True)
class EvalSet:
    """One named set. args: the settings of the run, those of this set in their places."""

    name: str
    path: str
    args: Any

    @property
    def n_samples_per_prompt(self) -> int:
        """Responses sampled for each prompt."""
        return int(self.args.n_samples_per_eval_prompt)

    @property
    def sampling_params(self) -> dict[str, Any]:
        """What differs from the rollout's sampling parameters."""
        params = {
            "temperature": self.args.eval_temperature,
            "top_p": self.args.eval_top_p,
            "top_k": self.args.eval_top_k,
            "max_new_tokens": self.args.eval_max_response_len,
        }
        if self.args.eval_min_new_tokens is not None:
            params["min_new_tokens"] = self.args.eval_min_new_tokens
        return params


@functools.lru_cache(maxsize=8)
def eval_sets(args: Any) -> tuple[EvalSet, ...]:
    """The sets of --eval-config, else of --eval-prompt-data (name and file in turn).

    Raises ValueError, one sentence with file, set and key, for a file that cannot be used.
    """
    if args.eval_config is None:
        pairs = args.eval_prompt_data or []
        return tuple(EvalSet(name, path, args) for name, path in zip(pairs[::2], pairs[1::2], strict=True))
    return tuple(
        EvalSet(entry.name, entry.path, _with_overrides(args, entry)) for entry in read_eval_config(args.eval_config)
    )


def samples_per_prompt(args: Any, names: Iterable[str]) -> dict[str, int]:
    """Samples of each prompt by set; a name of no set has --n-samples-per-eval-prompt."""
    known = {eval_set.name: eval_set.n_samples_per_prompt for eval_set in eval_sets(args)}
    return {name: known.get(name, args.n_samples_per_eval_prompt) for name in names}


def _with_overrides(args: Any, entry: EvalDatasetConfig) -> Any:
    """`args` as this set has them. Its rm_type also replaces the run's --custom-rm-path."""
    source = f"{args.eval_config}: set {entry.name!r}"
    settings = {setting.name: setting for group in GROUPS for setting in settings_of(group)}
    changes: dict[str, Any] = {}
    if entry.rm_type is not None and entry.custom_rm_path is None:
        changes["custom_rm_path"] = None
    for key, value in entry.overrides.items():
        setting = settings[SETTING_OF_KEY[key]]
        changes[setting.name] = check_value(setting._replace(name=key), value, source=source)
    try:
        own = dataclasses.replace(args, **changes)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    longest, context = own.eval_max_prompt_len, own.eval_max_context_len
    if longest is not None and context is not None and longest >= context:
        raise ConfigError(f"{source}: max_prompt_len {longest} must be below the context of {context} tokens.")
    return own


def eval_groups(eval_set: EvalSet) -> list[list[Sample]]:
    """Fresh samples of every prompt, n a group, numbered the same at every evaluation."""
    groups = []
    for number, prototype in enumerate(_dataset(eval_set.args, eval_set.path).samples):
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
        metadata_columns=tuple(args.metadata_columns),
        apply_chat_template=args.apply_chat_template,
        apply_chat_template_kwargs=args.apply_chat_template_kwargs,
    )
