r"""Supervised fine-tuning as a rollout: conversations of the data set become samples with a loss mask, no engine asked.

Used with --rollout-function-path slime.rollout.sft_rollout.generate_rollout --loss-type sft_loss --input-key messages,
without --apply-chat-template. A sample's response begins at the first token that is trained on:

    tokens          = [<|im_start|> user \n hi <|im_end|> \n <|im_start|> assistant \n hello <|im_end|> \n]
    response_length =                                                                   3
    loss_mask       =                                                                [  1       1       0]

With --completion-key prompt and completion are the conversation, and the completion alone is trained on: its text and
the end token, or, of messages, its assistant turns.

A conversation of more than --rollout-max-context-len tokens is cut at its end, left out, or refused, as --sft-overlong
says; how many were is counted.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.data_source import DataSource
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.mask_utils import MultiTurnLossMaskGenerator
from slime.utils.types import Sample, SampleStatus


def generate_rollout(
    args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The next args.rollout_batch_size conversations, or those that are left, as groups of scored samples, reward 0.

    Raises ValueError, naming the sample, for a prompt that is no list of messages, a turn that cannot be masked
    exactly, or a conversation with no token to train on.
    """
    if evaluation:
        raise ValueError("slime.rollout.sft_rollout has no evaluation. Give an --eval-function-path that samples.")
    generator = MultiTurnLossMaskGenerator(tokenizer_of(args), args.loss_mask_type, args.apply_chat_template_kwargs)
    options = Options(args.rollout_max_context_len, args.sft_overlong, args.completion_key is not None)
    groups: list[list[Sample]] = []
    num_dropped = 0
    while len(groups) < args.rollout_batch_size:
        drawn = data_source.get_samples(args.rollout_batch_size - len(groups))
        if not drawn:
            break
        kept = [group for group in drawn if all(_is_filled(sample, generator, options) for sample in group)]
        groups += kept
        num_dropped += len(drawn) - len(kept)
        if num_dropped > max(len(data_source), args.rollout_batch_size) and not groups:
            raise ValueError(
                f"all conversations are longer than --rollout-max-context-len {options.max_context_len}: raise it, or "
                "use --sft-overlong cut."
            )
    if not groups:
        raise ValueError(
            "the data source gave no conversations: its end is reached, or its get_samples returns nothing"
        )
    samples = [sample for group in groups for sample in group]
    metrics = {
        "rollout/sft_truncated": sum(sample.status is SampleStatus.TRUNCATED for sample in samples),
        "rollout/sft_dropped": num_dropped,
        "rollout/sft_trained_tokens": sum(sample.effective_response_length for sample in samples),
    }
    return RolloutFnTrainOutput(groups, metrics)


class Options(NamedTuple):
    """max_context_len: tokens of a conversation, None for any number. overlong: what becomes of a longer one.

    has_completions: samples have a completion beside the prompt, and it alone is trained on.
    """

    max_context_len: int | None
    overlong: Literal["cut", "drop", "error"]
    has_completions: bool


def _conversation_tokens(sample: Sample, generator: MultiTurnLossMaskGenerator) -> tuple[list[int], list[int]]:
    if isinstance(sample.prompt, str):
        raise ValueError(
            "supervised fine-tuning needs chat messages, this is text. Set --input-key to the messages and leave out "
            "--apply-chat-template, or name what answers the text with --completion-key."
        )
    return generator.get_loss_mask(sample.prompt, tools=sample.metadata.get("tools"))


def _completion_tokens(sample: Sample, generator: MultiTurnLossMaskGenerator) -> tuple[list[int], list[int]]:
    """Prompt and completion, of which the completion is trained on: its text and the end token, or its turns."""
    completion = sample.metadata["completion"]
    if isinstance(sample.prompt, str) and isinstance(completion, str):
        end = str(generator.tokenizer.eos_token or "")
        texts = [sample.prompt, completion.removesuffix(end) + end]
        prompt_ids, completion_ids = generator.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids)
    if isinstance(sample.prompt, str):
        raise ValueError("the completion is a list of messages: leave out --apply-chat-template")
    context = [{**message, "step_loss_mask": 0} for message in sample.prompt]
    return generator.get_loss_mask([*context, *completion], tools=sample.metadata.get("tools"))


def _is_filled(sample: Sample, generator: MultiTurnLossMaskGenerator, options: Options) -> bool:
    """Whether `sample` was made of its conversation; False for one that is left out."""
    try:
        return _fill(sample, generator, options)
    except ValueError as error:
        raise ValueError(f"sample {sample.index}, prompt {sample.prompt!r:.120}: {error}") from error


def _fill(sample: Sample, generator: MultiTurnLossMaskGenerator, options: Options) -> bool:
    """Sets tokens, response, loss mask, reward and status from the conversation in `sample.prompt`.

    Returns False, with nothing set, for one that is too long and to be left out.
    """
    max_context_len, overlong, has_completions = options
    encode = _completion_tokens if has_completions else _conversation_tokens
    all_token_ids, whole_mask = encode(sample, generator)
    if max_context_len is not None and len(all_token_ids) > max_context_len:
        if overlong == "error":
            raise ValueError(
                f"it has {len(all_token_ids)} tokens, --rollout-max-context-len is {max_context_len}. Raise it, take "
                "the conversation out, or set --sft-overlong to cut or drop."
            )
        if overlong == "drop":
            return False
    token_ids, mask = all_token_ids[:max_context_len], whole_mask[:max_context_len]
    if 1 not in mask:
        raise ValueError(
            f"none of its first {len(mask)} of {len(whole_mask)} tokens is trained on. Give it an assistant turn with "
            "step_loss_mask 1 (within --rollout-max-context-len), or take it out."
        )
    (response_length,) = generator.get_response_lengths([mask])
    sample.tokens = token_ids
    sample.response_length = response_length
    sample.loss_mask = mask[-response_length:]
    sample.response = str(generator.tokenizer.decode(token_ids[-response_length:], skip_special_tokens=False))
    sample.reward = 0.0
    sample.status = SampleStatus.COMPLETED if len(mask) == len(whole_mask) else SampleStatus.TRUNCATED
    return True
