import dataclasses
import json
from dataclasses import dataclass

import pytest

from slime.rollout.data_source import RolloutDataSource
from slime.rollout.sft_rollout import generate_rollout
from slime.utils.types import SampleStatus
from tests.helpers.tiny_models import make_tokenizer
from tests.rollout.test_data_source import SourceArgs

CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "step_loss_mask": 0},
    {"role": "user", "content": "what is 17 + 25 ?"},
    {"role": "assistant", "content": "the answer is 42"},
    {"role": "user", "content": "thanks"},
]

LIMIT = 40  # tokens: fewer than the conversation has, more than a question and its answer


@dataclass(frozen=True)
class SftArgs(SourceArgs):
    rollout_batch_size: int = 2
    loss_mask_type: str = "qwen"
    rollout_max_context_len: int | None = None
    sft_overlong: str = "cut"


@pytest.fixture
def make_args(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")

    def make(*prompts, **overrides):
        path = tmp_path / "rows.jsonl"
        rows = [prompt if isinstance(prompt, dict) else {"messages": prompt} for prompt in prompts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args = SftArgs(prompt_data=str(path), hf_checkpoint=str(tmp_path / "model"), input_key="messages")
        return dataclasses.replace(args, **overrides)

    return make


def roll(args):
    return generate_rollout(args, 0, RolloutDataSource(args))


def test_a_conversation_becomes_a_sample_whose_response_starts_at_the_first_trained_token(make_args):
    args = make_args(CONVERSATION, CONVERSATION[:2] + CONVERSATION[3:4])
    tokenizer = make_tokenizer()
    output = roll(args)
    (first,), (second,) = output.samples
    assert tokenizer.decode(first.tokens) == "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in CONVERSATION
    )
    trained = tokenizer("the answer is 42<|im_end|>")["input_ids"]
    behind = tokenizer("\n<|im_start|>user\nthanks<|im_end|>\n")["input_ids"]
    assert first.tokens[-first.response_length :] == trained + behind
    assert first.loss_mask == [1] * len(trained) + [0] * len(behind)
    assert first.response.startswith("the answer is 42<|im_end|>")
    assert (first.reward, first.status) == (0.0, SampleStatus.COMPLETED)
    assert second.loss_mask == [1] * len(trained) + [0]
    for sample in (first, second):
        sample.check()
    assert output.metrics == {
        "rollout/sft_truncated": 0, "rollout/sft_dropped": 0, "rollout/sft_trained_tokens": 2 * len(trained)
    }  # fmt: skip


def test_a_long_conversation_is_cut_at_its_end_and_counted(make_args):
    args = make_args(CONVERSATION[:4], CONVERSATION[2:4])
    whole, short = (sample for (sample,) in roll(args).samples)
    limit = len(whole.tokens) - 3
    output = roll(dataclasses.replace(args, rollout_max_context_len=limit))
    (cut,), (kept,) = output.samples
    assert (cut.tokens, cut.loss_mask) == (whole.tokens[:limit], whole.loss_mask[:-3])
    assert (cut.status, kept.status) == (SampleStatus.TRUNCATED, SampleStatus.COMPLETED)
    assert kept.tokens == short.tokens
    assert output.metrics["rollout/sft_truncated"] == 1


def test_long_conversations_may_be_left_out_and_the_next_ones_taken(make_args):
    short, other = CONVERSATION[2:4], [CONVERSATION[0], {"role": "assistant", "content": "hello"}]
    args = make_args(CONVERSATION, short, CONVERSATION, CONVERSATION, other, sft_overlong="drop")
    output = roll(dataclasses.replace(args, rollout_max_context_len=LIMIT))
    assert [group[0].prompt for group in output.samples] == [short, other]
    assert output.metrics["rollout/sft_dropped"] == 3 and output.metrics["rollout/sft_truncated"] == 0


def test_a_rollout_ends_where_every_conversation_is_too_long(make_args):
    args = make_args(CONVERSATION, CONVERSATION, sft_overlong="drop", rollout_max_context_len=LIMIT)
    with pytest.raises(ValueError, match=f"all conversations are longer than --rollout-max-context-len {LIMIT}"):
        roll(args)


def test_a_data_source_that_ends_gives_a_shorter_rollout_and_then_a_sentence(make_args):
    args = make_args(CONVERSATION, rollout_batch_size=3)
    source = RolloutDataSource(args)
    take = source.get_samples
    source.get_samples = lambda count: take(min(count, 2 - source.sample_group_index))
    assert len(generate_rollout(args, 0, source).samples) == 2
    with pytest.raises(ValueError, match="the data source gave no conversations"):
        generate_rollout(args, 1, source)


def test_a_long_conversation_may_stop_the_run(make_args):
    args = make_args(CONVERSATION[2:4], CONVERSATION, sft_overlong="error", rollout_max_context_len=LIMIT)
    with pytest.raises(ValueError, match=f"sample 1, .*tokens, --rollout-max-context-len is {LIMIT}"):
        roll(args)


def test_a_conversation_without_a_trained_token_is_named(make_args):
    with pytest.raises(ValueError, match="sample 1, prompt .*'hi'.*: none of its first .* tokens is trained on"):
        roll(make_args(CONVERSATION, CONVERSATION[:2]))
    with pytest.raises(ValueError, match="none of its first 5 of .* tokens is trained on"):
        roll(make_args(CONVERSATION, rollout_batch_size=1, rollout_max_context_len=5))


def test_a_text_prompt_is_refused_with_the_flag_to_set(make_args):
    with pytest.raises(ValueError, match="sample 0, .*needs chat messages.*--input-key"):
        roll(make_args("hi", "ho"))


def test_a_turn_that_cannot_be_masked_is_named_with_its_sample(make_args):
    with pytest.raises(ValueError, match="sample 0, .*message 0 is an assistant turn"):
        roll(make_args(CONVERSATION[3:]))


def test_there_is_no_evaluation(make_args):
    args = make_args(CONVERSATION)
    with pytest.raises(ValueError, match="--eval-function-path"):
        generate_rollout(args, 0, RolloutDataSource(args), evaluation=True)


COMPLETIONS = {"input_key": "prompt", "completion_key": "completion", "rollout_batch_size": 1}


@pytest.mark.parametrize("completion", ["it is 42", "it is 42<|im_end|>"])
def test_a_completion_of_text_is_trained_on_with_the_end_token(make_args, completion):
    args = make_args({"prompt": "17 + 25 = ", "completion": completion}, **COMPLETIONS)
    ((sample,),) = roll(args).samples
    tokenizer = make_tokenizer()
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("17 + 25 = ", "it is 42<|im_end|>"))
    assert (sample.tokens, sample.loss_mask) == (prompt + answer, [1] * len(answer))


def test_a_completion_of_text_answers_the_prompt_that_the_chat_template_makes_of_a_text(make_args):
    args = make_args({"prompt": "hi", "completion": "hello"}, apply_chat_template=True, **COMPLETIONS)
    ((sample,),) = roll(args).samples
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    own = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert sample.tokens == own[:-1] and sample.response == "hello<|im_end|>"  # the line break behind is not sampled


def test_of_messages_the_turns_of_the_completion_alone_are_trained_on(make_args):
    prompt = [{**turn, "step_loss_mask": 1} for turn in CONVERSATION[:3]]
    args = make_args({"prompt": prompt, "completion": CONVERSATION[3:]}, **COMPLETIONS)
    ((sample,),) = roll(args).samples
    ((whole,),) = roll(make_args(CONVERSATION, rollout_batch_size=1)).samples
    assert (sample.tokens, sample.loss_mask) == (whole.tokens, whole.loss_mask)


def test_rendered_prompts_cannot_be_answered_by_messages(make_args):
    row = {"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}
    with pytest.raises(ValueError, match="sample 0, .*leave out --apply-chat-template"):
        roll(make_args(row, apply_chat_template=True, **COMPLETIONS))
