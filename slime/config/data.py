"""Where prompts come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from slime.config.base import Group, arg


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group):
    """Data: prompt files, their keys, and the order in which they are read."""

    prompt_data: str | None = arg(
        None, "Prompts: a jsonl or parquet file, or a folder of datasets' save_to_disk; `path@[a:b]` takes a slice."
    )
    input_key: str = arg("input", "Key of the prompt: a text, or a list of chat messages.")
    label_key: str | None = arg(
        None, "Key of the reference answer; a dot leads into an object: reward_model.ground_truth."
    )
    metadata_key: str = arg("metadata", "Key of a dict that reaches plug-ins as `sample.metadata`.")
    metadata_columns: list[str] = arg(
        [], "Keys of further columns that reach plug-ins in `sample.metadata`, under these names."
    )
    completion_key: str | None = arg(
        None, "SFT on prompts and completions: key of the completion, a text or messages as the prompt is."
    )
    tool_key: str = arg("tools", "Key of the tool descriptions given to the chat template.")
    apply_chat_template: bool = arg(False, "Render chat messages with the tokenizer's template.")
    apply_chat_template_kwargs: dict[str, Any] = arg({}, "JSON: further arguments of the chat template.")
    rollout_shuffle: bool = arg(False, "Shuffle the prompts anew every epoch.")
    rollout_global_dataset: bool = arg(
        True,
        "Read --prompt-data; off: the rollout function finds its own prompts.",
        disable="--disable-rollout-global-dataset",
    )
    data_source_path: str = arg("slime.rollout.data_source.RolloutDataSourceWithBuffer", "The data source class.")
    buffer_filter_path: str | None = arg(
        None, "f(args, rollout_id, buffer, num_samples): picks groups from the buffer."
    )
    loss_mask_type: Literal["qwen", "qwen3", "qwen3_5", "distill_qwen"] = arg(
        "qwen", "Chat family of the loss mask of SFT."
    )
    sft_overlong: Literal["cut", "drop", "error"] = arg(
        "cut",
        "SFT: what becomes of a conversation longer than --rollout-max-context-len: its end is cut off, it is "
        "left out and the next one taken, or the run stops.",
    )
