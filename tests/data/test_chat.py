import pytest

from slime.data.chat import check_messages, following_text, render_prompt
from tests.helpers.qwen_templates import shipped_tokenizer
from tests.helpers.tiny_models import make_tokenizer

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "the list of messages is empty"),
        ([USER, "hi"], "message 1 must be"),
        ([{"role": "user"}], "message 0 lacks content, it has .'role'."),
        ([{"role": 1, "content": "hi"}], "role must be a string"),
        ([{"role": "user", "content": 1}], "content must be a string"),
    ],
)
def test_a_malformed_conversation_is_named_with_its_place(messages, reason):
    with pytest.raises(ValueError, match=f"^a.jsonl:3: .*{reason}"):
        check_messages(messages, "a.jsonl:3")


def test_null_keys_of_a_message_count_as_absent_but_for_content():
    message = {"role": "assistant", "content": None, "tool_calls": None, "step_loss_mask": 0}
    assert check_messages([message], "here") == [{"role": "assistant", "content": None, "step_loss_mask": 0}]


def test_a_rendered_prompt_ends_with_the_header_of_the_answer():
    assert render_prompt(make_tokenizer(), [USER]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_tools_and_template_variables_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['function']['name'] }} {{ mood }}"
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert render_prompt(tokenizer, [USER], tools=tools, template_kwargs={"mood": "calm"}) == "add calm"


def test_a_template_that_refuses_the_messages_says_why():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(ValueError, match="refuses these messages .no system messages"):
        render_prompt(tokenizer, [USER])


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template"):
        render_prompt(tokenizer, [USER])


def test_content_that_the_template_leaves_out_is_an_error():
    with pytest.raises(ValueError, match="message 0: the chat template leaves out content given as a list of parts"):
        render_prompt(
            shipped_tokenizer("qwen3"), [{"role": "user", "content": [{"type": "text", "text": "a question"}]}]
        )


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_instruct_2507", "qwen3", "deepseek_r1_distill"])
@pytest.mark.parametrize("new", [[USER], [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]])
def test_what_follows_a_turn_is_what_shipped_templates_put_there(template, new):
    tokenizer = shipped_tokenizer(template)
    before = [{"role": "system", "content": "be kind"}, USER]
    whole = render_prompt(tokenizer, [*before, {"role": "assistant", "content": "my words"}, *new])
    assert whole.endswith("my words" + following_text(tokenizer, before, new))


def test_of_what_follows_only_the_new_messages_must_be_shown():
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    before = [USER, {"role": "assistant", "content": "so", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    deepseek = shipped_tokenizer("deepseek_r1_distill")
    assert following_text(deepseek, before, [USER]) == "<｜end▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>\n"
    with pytest.raises(ValueError, match="message 0: the chat template leaves out content given as a list of parts"):
        following_text(
            shipped_tokenizer("qwen3"), [USER], [{"role": "user", "content": [{"type": "text", "text": "b"}]}]
        )
