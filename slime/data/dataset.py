"""Prompts of a data file as `Sample` prototypes.

One line of a file, and the sample it becomes with input_key="prompt", label_key="label", apply_chat_template=True:

    {"prompt": [{"role": "user", "content": "1+1=?"}], "label": 2, "metadata": {"level": "easy"}, "tools": [...]}

    Sample(prompt="<|im_start|>user\\n1+1=?<|im_end|>\\n<|im_start|>assistant\\n", label="2",
           metadata={"level": "easy", "tools": [...]})

Without apply_chat_template the prompt stays what it is: text, or the list of messages.

A key may lead into objects. The columns of verl are read with input_key="prompt",
label_key="reward_model.ground_truth", metadata_key="extra_info", metadata_columns=("data_source",); those of TRL with
input_key="prompt" and the other columns in metadata_columns; for supervised fine-tuning with input_key="messages", or
with input_key="prompt" and completion_key="completion".
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slime.data.chat import check_messages, render_prompt
from slime.data.files import Row, read_rows
from slime.utils.types import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ABSENT = object()
_TOKENIZER_BATCH = 1024  # prompts a call: long enough for the tokenizer's threads, short enough for memory


@dataclass(frozen=True)
class RowKeys:
    """Under which keys a row holds prompt, label, metadata and tools. Only metadata and tools may be absent.

    A key is that of a column, or leads into objects: "reward_model.ground_truth".
    metadata_columns: further keys, whose values enter the metadata under these names.
    completion_key: what the prompt is answered with, a text or messages as the prompt is; it enters the metadata as
        "completion".
    """

    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str | None = "metadata"
    tool_key: str | None = "tools"
    metadata_columns: tuple[str, ...] = ()
    completion_key: str | None = None

    def read(self, row: Row) -> Sample:
        """The prototype of one row, its prompt as in the file. Raises ValueError with the row's location."""
        metadata = dict(self._optional(row, self.metadata_key, dict) or {})
        metadata |= {key: _required(row, key, "--metadata-columns") for key in self.metadata_columns}
        tools = self._optional(row, self.tool_key, list)
        if tools:
            metadata["tools"] = tools
        prompt = _text_or_messages(row, self.input_key, "--input-key")
        if self.completion_key is not None:
            metadata["completion"] = completion = _text_or_messages(row, self.completion_key, "--completion-key")
            if isinstance(completion, str) != isinstance(prompt, str):
                raise ValueError(
                    f"{row.location}: {self.input_key!r} and {self.completion_key!r} must both be text or both be "
                    "lists of messages"
                )
        return Sample(prompt=prompt, label=self._label(row), metadata=metadata)

    def _label(self, row: Row) -> str | None:
        if self.label_key is None:
            return None
        value = _required(row, self.label_key, "--label-key")
        if isinstance(value, str):
            return value
        if not isinstance(value, bool | int | float):
            raise ValueError(
                f"{row.location}: {self.label_key!r} must be a string, a number or a boolean, got {value!r:.80}. "
                "Anything else belongs in the metadata."
            )
        return json.dumps(value)

    def _optional(self, row: Row, key: str | None, kind: type) -> Any:
        """The object under `key`, also where it is JSON in a string, as parquet files often have it; None if absent."""
        value = None if key is None else _value_at(row.values, key)
        if value is _ABSENT:
            return None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{row.location}: {key!r} is text that is not valid JSON ({error.msg})") from error
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{row.location}: {key!r} must be a {kind.__name__}, got {value!r:.80}")
        return value


def _text_or_messages(row: Row, key: str, flag: str) -> str | list[Message]:
    value = _required(row, key, flag)
    if isinstance(value, list):
        return check_messages(value, f"{row.location}: {key!r}")
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{row.location}: {key!r} must be text or a list of messages, got {value!r:.80} ({type(value).__name__})"
        )
    return value


def _required(row: Row, key: str, flag: str) -> Any:
    value = _value_at(row.values, key)
    if value is _ABSENT:
        raise ValueError(f"{row.location}: no key {key!r}, it has {sorted(row.values)}. Set {flag}.")
    return value


def _value_at(values: dict[str, Any], key: str) -> Any:
    """The value under `key`, or under the path of keys that its dots separate; `_ABSENT` where there is none."""
    if key in values:
        return values[key]
    head, dot, rest = key.partition(".")
    inner = values.get(head)
    return _value_at(inner, rest) if dot and isinstance(inner, dict) else _ABSENT


def check_prompt_file(
    path: str,
    *,
    input_key: str = "input",
    label_key: str | None = None,
    metadata_key: str | None = "metadata",
    tool_key: str | None = "tools",
    metadata_columns: tuple[str, ...] = (),
) -> int:
    """The number of prompts in `path`, after a check of every row. Needs no tokenizer.

    Raises ValueError, one sentence with file, line and reason, at the first row that `Dataset` would refuse.
    """
    keys = RowKeys(input_key, label_key, metadata_key, tool_key, metadata_columns)
    num_prompts = 0
    for row in read_rows(path):
        keys.read(row)
        num_prompts += 1
    _check_not_empty(path, num_prompts)
    return num_prompts


def _check_not_empty(path: str, num_prompts: int) -> None:
    if num_prompts == 0:
        raise ValueError(f"data file {path!r} holds no prompts")


@dataclass
class Dataset:
    """The prompts of one file; `samples` is their order in the current epoch.

    path: a .jsonl or .parquet file or a folder of `datasets`, with an optional slice: `file@[start:stop]`.
    tokenizer: needed with max_prompt_len or apply_chat_template only.
    max_prompt_len: prompts of more tokens are dropped and counted; None keeps all. A prompt that stays a list of
        messages has no length yet and is kept.
    apply_chat_template: render messages to text; a text prompt counts as one user message.
    seed: with the epoch it decides the order of `shuffle`.
    Raises ValueError for whatever cannot be read (file, line, reason) and where no prompt remains.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase | None = None
    max_prompt_len: int | None = None
    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str | None = "metadata"
    tool_key: str | None = "tools"
    metadata_columns: tuple[str, ...] = ()
    completion_key: str | None = None
    apply_chat_template: bool = False
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 42
    origin_samples: list[Sample] = field(init=False, repr=False)
    samples: list[Sample] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = self.metadata_columns
        keys = RowKeys(self.input_key, self.label_key, self.metadata_key, self.tool_key, columns, self.completion_key)
        samples = []
        for row in read_rows(self.path):
            sample = keys.read(row)
            if self.apply_chat_template:
                sample.prompt = self._render(sample, row.location)
            samples.append(sample)
        _check_not_empty(self.path, len(samples))
        if self.max_prompt_len is not None:
            samples = self._without_long(samples, self.max_prompt_len)
        self.origin_samples = samples
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def shuffle(self, epoch: int) -> None:
        """Puts `samples` in the order of `epoch`, a function of seed, epoch and file alone: the same on any machine."""
        order = list(range(len(self.origin_samples)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        self.samples = [self.origin_samples[index] for index in order]

    def _render(self, sample: Sample, location: str) -> str:
        messages = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        try:
            return render_prompt(
                self._need_tokenizer("apply_chat_template"),
                messages,
                tools=sample.metadata.get("tools"),
                template_kwargs=self.apply_chat_template_kwargs,
            )
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from error

    def _without_long(self, samples: list[Sample], max_prompt_len: int) -> list[Sample]:
        tokenizer = self._need_tokenizer("max_prompt_len")
        kept = []
        for start in range(0, len(samples), _TOKENIZER_BATCH):
            batch = samples[start : start + _TOKENIZER_BATCH]
            lengths = _prompt_lengths(tokenizer, batch)
            kept += [sample for sample, length in zip(batch, lengths, strict=True) if length <= max_prompt_len]
        if not kept:
            raise ValueError(
                f"data file {self.path!r}: all {len(samples)} prompts are longer than {max_prompt_len} tokens. "
                "Raise --rollout-max-prompt-len."
            )
        if len(kept) < len(samples):
            logger.warning(
                "%s: %d of %d prompts dropped, longer than %d tokens",
                self.path, len(samples) - len(kept), len(samples), max_prompt_len,
            )  # fmt: skip
        return kept

    def _need_tokenizer(self, argument: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"Dataset: {argument} needs a tokenizer")
        return self.tokenizer


def _prompt_lengths(tokenizer: PreTrainedTokenizerBase, samples: list[Sample]) -> list[int]:
    """Tokens of each text prompt, [len(samples)]; 0 for a list of messages."""
    texts = [sample.prompt if isinstance(sample.prompt, str) else "" for sample in samples]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [len(token_ids) for token_ids in encoded["input_ids"]]
