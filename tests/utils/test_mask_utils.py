import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from slime.utils.mask_utils import MultiTurnLossMaskGenerator
from tests.helpers.tiny_models import make_tokenizer

# Each template does to earlier turns what its family does; the rest is as short as it can be.
TURN = "<|im_start|>{{ message.role }}\n{{ text }}<|im_end|>\n"
THINKING_TEMPLATE = (
    "{% set ns = namespace(query=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set text = message.content %}{% if message.role == 'assistant' %}"
    "{% set parts = message.content.split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{% set text = answer %}{% if loop.index0 > ns.query and (loop.last or thought) %}"
    "{% set text = '<think>\n' + thought + '\n</think>\n\n' + answer %}{% endif %}{% endif %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DISTILL_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "<A>{{ message.content.split('</think>')[-1] }}<|im_end|>{% else %}<U>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "more ü"}
TOOL = {"role": "tool", "content": "42"}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def thinking(template=THINKING_TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def masked(generator, messages, **kwargs):
    """Token ids, and the texts that are trained on."""
    token_ids, loss_mask = generator.get_loss_mask(messages, **kwargs)
    assert len(token_ids) == len(loss_mask) and set(loss_mask) <= {0, 1}
    return token_ids, generator.get_text_from_loss_mask(token_ids, loss_mask)


def rendered_ids(tokenizer, messages):
    clean = [{key: value for key, value in message.items() if key != "step_loss_mask"} for message in messages]
    return tokenizer.apply_chat_template(clean, tokenize=True, return_dict=False)


def test_answers_are_trained_on_with_their_end_token_and_without_the_line_break_behind():
    tokenizer = make_tokenizer()
    messages = [{"role": "system", "content": "be kind"}, USER, assistant("hello"), MORE, assistant("the answer is 42")]
    token_ids, texts = masked(MultiTurnLossMaskGenerator(tokenizer), messages)
    assert texts == ["hello<|im_end|>", "the answer is 42<|im_end|>"]
    assert token_ids == rendered_ids(tokenizer, messages)


def test_step_loss_mask_0_leaves_a_turn_out_and_changes_no_token():
    generator = MultiTurnLossMaskGenerator(make_tokenizer())
    messages = [USER, assistant("a", step_loss_mask=0), MORE, assistant("b", step_loss_mask=1)]
    token_ids, texts = masked(generator, messages)
    assert texts == ["b<|im_end|>"]
    assert token_ids == masked(generator, [USER, assistant("a"), MORE, assistant("b")])[0]


def test_the_template_does_not_see_step_loss_mask():
    template = "{% for message in messages %}{{ message | tojson }}<|im_end|>{% endfor %}"
    messages = [USER, assistant("a", step_loss_mask=1)]
    token_ids, _ = masked(MultiTurnLossMaskGenerator(thinking(template)), messages)
    assert token_ids == rendered_ids(thinking(template), messages)


def test_tool_results_are_not_trained_on_and_tools_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['function']['name'] }}\n" + tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [USER, assistant("add(40, 2)"), TOOL, assistant("42!")]
    token_ids, texts = masked(MultiTurnLossMaskGenerator(tokenizer), messages, tools=tools)
    assert texts == ["add(40, 2)<|im_end|>", "42!<|im_end|>"]
    assert tokenizer.decode(token_ids).startswith("add\n<|im_start|>user")


def test_a_conversation_without_a_trained_turn_has_an_empty_mask():
    _, loss_mask = MultiTurnLossMaskGenerator(make_tokenizer()).get_loss_mask([USER, assistant("a", step_loss_mask=0)])
    assert sum(loss_mask) == 0


def test_qwen3_trains_on_the_last_answer_with_its_reasoning():
    tokenizer = thinking()
    messages = [USER, assistant("<think>\nhm\n</think>\n\nhello")]
    token_ids, texts = masked(MultiTurnLossMaskGenerator(tokenizer, "qwen3"), messages)
    assert texts == ["<think>\nhm\n</think>\n\nhello<|im_end|>"]
    assert token_ids == rendered_ids(tokenizer, messages)


def test_qwen3_trains_on_earlier_answers_as_the_whole_rendering_has_them():
    tokenizer = thinking()
    messages = [USER, assistant("hello"), MORE, assistant("add"), TOOL, assistant("ok")]
    token_ids, texts = masked(MultiTurnLossMaskGenerator(tokenizer, "qwen3"), messages)
    assert texts == ["hello<|im_end|>", "add<|im_end|>", "<think>\n\n</think>\n\nok<|im_end|>"]
    assert token_ids == rendered_ids(tokenizer, messages)


def test_qwen3_keeps_the_reasoning_between_tool_calls_of_the_last_question():
    messages = [USER, assistant("<think>\na\n</think>\n\nadd"), TOOL, assistant("sub"), TOOL, assistant("done")]
    _, texts = masked(MultiTurnLossMaskGenerator(thinking(), "qwen3"), messages)
    assert texts == [
        "<think>\na\n</think>\n\nadd<|im_end|>", "sub<|im_end|>", "<think>\n\n</think>\n\ndone<|im_end|>"
    ]  # fmt: skip


# Results of one turn's calls stand in one turn of the user, as in Qwen's templates; reasoning is a field of its own.
TOOL_TEMPLATE = (
    "{% set ns = namespace(query=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.query = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{% if message.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}<r>{{ message.content }}</r>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > ns.query and (loop.last or message.reasoning_content) %}"
    "<think>\n{{ message.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<c>{{ call.function.name }}</c>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def calls(*names, **fields):
    return assistant("", tool_calls=[{"type": "function", "function": {"name": name}} for name in names], **fields)


def test_results_of_several_calls_in_one_turn_are_masked_and_the_calls_trained_on():
    tokenizer = thinking(TOOL_TEMPLATE)
    messages = [USER, calls("a", "b"), TOOL, TOOL, calls("c"), TOOL, assistant("done"), MORE, assistant("bye")]
    token_ids, texts = masked(MultiTurnLossMaskGenerator(tokenizer, "qwen3"), messages)
    assert texts == [
        "<c>a</c><c>b</c><|im_end|>", "<c>c</c><|im_end|>", "done<|im_end|>", "<think>\n\n</think>\n\nbye<|im_end|>"
    ]  # fmt: skip
    assert token_ids == rendered_ids(tokenizer, messages)
    assert tokenizer.decode(token_ids).count("user<r>42</r><r>42</r><|im_end|>") == 1


def test_reasoning_between_calls_is_trained_on_until_the_next_question_drops_it():
    tokenizer = thinking(TOOL_TEMPLATE)
    generator = MultiTurnLossMaskGenerator(tokenizer, "qwen3")
    turns = [USER, calls("a", reasoning_content="hm"), TOOL, TOOL, assistant("done", reasoning_content="so")]
    token_ids, texts = masked(generator, turns)
    assert texts == ["<think>\nhm\n</think>\n\n<c>a</c><|im_end|>", "<think>\nso\n</think>\n\ndone<|im_end|>"]
    assert token_ids == rendered_ids(tokenizer, turns)
    with pytest.raises(ValueError, match="message 1: the chat template drops part of its reasoning_content"):
        generator.get_loss_mask([*turns, MORE, assistant("bye")])
    left_out = [{**turn, "step_loss_mask": 0} if turn["role"] == "assistant" else turn for turn in turns]
    token_ids, texts = masked(generator, [*left_out, MORE, assistant("bye")])
    assert texts == ["<think>\n\n</think>\n\nbye<|im_end|>"]


def test_qwen3_refuses_an_answer_whose_reasoning_the_template_drops():
    generator = MultiTurnLossMaskGenerator(thinking(), "qwen3")
    reasoned = "<think>\nhm\n</think>\n\nhello"
    with pytest.raises(ValueError, match="message 1: the chat template drops part of its content"):
        generator.get_loss_mask([USER, assistant(reasoned), MORE, assistant("ok")])
    _, texts = masked(generator, [USER, assistant(reasoned, step_loss_mask=0), MORE, assistant("ok")])
    assert texts == ["<think>\n\n</think>\n\nok<|im_end|>"]


def test_qwen_refuses_a_template_that_changes_earlier_turns():
    with pytest.raises(ValueError, match="message 1: the chat template renders this turn differently"):
        MultiTurnLossMaskGenerator(thinking(), "qwen").get_loss_mask([USER, assistant("a"), MORE, assistant("b")])


def test_template_variables_move_the_boundary():
    template = THINKING_TEMPLATE.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n{{ '' if think else '<think>\n\n</think>\n\n' }}{% endif %}",
    )
    messages = [USER, assistant("hello")]
    assert masked(MultiTurnLossMaskGenerator(thinking(template), "qwen3", {"think": False}), messages)[1] == [
        "hello<|im_end|>"
    ]
    assert masked(MultiTurnLossMaskGenerator(thinking(template), "qwen3", {"think": True}), messages)[1] == [
        "<think>\n\n</think>\n\nhello<|im_end|>"
    ]


@pytest.mark.parametrize("content", ["hm\n</think>\n\nhello", "<think>\nhm\n</think>\n\nhello"])
def test_distill_qwen_puts_the_whole_last_answer_behind_the_generation_prompt(content):
    tokenizer = thinking(DISTILL_TEMPLATE)
    messages = [USER, assistant("<think>\nx\n</think>\n\ny", step_loss_mask=0), MORE, assistant(content)]
    token_ids, texts = masked(MultiTurnLossMaskGenerator(tokenizer, "distill_qwen"), messages)
    assert texts == ["hm\n</think>\n\nhello<|im_end|>"]
    prompt_ids = tokenizer.apply_chat_template(
        messages[:3], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert token_ids[: len(prompt_ids)] == prompt_ids


def test_distill_qwen_refuses_to_train_on_earlier_turns_and_another_family():
    messages = [USER, assistant("a"), MORE, assistant("b")]
    with pytest.raises(ValueError, match="message 1: under --loss-mask-type distill_qwen only the last"):
        MultiTurnLossMaskGenerator(thinking(DISTILL_TEMPLATE), "distill_qwen").get_loss_mask(messages)
    upper = DISTILL_TEMPLATE.replace("[-1] }}", "[-1] | upper }}")
    with pytest.raises(ValueError, match="message 1: the chat template is not of the family distill_qwen"):
        MultiTurnLossMaskGenerator(thinking(upper), "distill_qwen").get_loss_mask([USER, assistant("a")])


def test_a_token_that_would_reach_over_the_boundary_is_split_there_as_at_generation():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<e>"], vocab_size=300,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["\n\n"] * 10, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    fast.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}u{{ message.content }}{% else %}"
        "a\n{{ message.content }}<e>{% endif %}{% endfor %}{% if add_generation_prompt %}a\n{% endif %}"
    )
    messages = [USER, assistant("\nhello")]
    assert fast.convert_tokens_to_ids("ĊĊ") in rendered_ids(fast, messages)
    token_ids, texts = masked(MultiTurnLossMaskGenerator(fast), messages)
    assert texts == ["\nhello<e>"]
    assert fast.decode(token_ids) == "uhia\n\nhello<e>"


def test_a_tokenizer_that_spells_a_turn_differently_when_alone_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "_hi": 1, "hi": 2, "_hello": 3, "hello": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement="_", prepend_scheme="never")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{{ ' ' if loop.first }}{% endfor %}"
    with pytest.raises(ValueError, match="other text for a turn alone"):
        MultiTurnLossMaskGenerator(fast).get_loss_mask([USER, assistant("hello")])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([assistant("a")], "message 0 is an assistant turn"),
        ([USER, assistant("a", step_loss_mask=2)], "message 1: step_loss_mask must be 0 or 1, got 2"),
    ],
)
def test_what_cannot_be_masked_is_an_error_naming_the_message(messages, reason):
    with pytest.raises(ValueError, match=reason):
        MultiTurnLossMaskGenerator(make_tokenizer()).get_loss_mask(messages)


def test_a_template_that_refuses_the_messages_says_why():
    with pytest.raises(ValueError, match="refuses these messages .no tools"):
        MultiTurnLossMaskGenerator(thinking("{{ raise_exception('no tools') }}")).get_loss_mask([USER, assistant("a")])


def test_an_unknown_family_is_refused():
    with pytest.raises(
        ValueError, match="--loss-mask-type must be one of qwen, qwen3, qwen3_5, distill_qwen, got 'llama'"
    ):
        MultiTurnLossMaskGenerator(make_tokenizer(), "llama")


def test_a_response_begins_at_the_first_trained_token():
    lengths = MultiTurnLossMaskGenerator(make_tokenizer()).get_response_lengths([[0, 1, 0, 1, 0], [1], [0, 0], []])
    assert lengths == [4, 1, 0, 0]
