import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from slime.data.dataset import Dataset, check_prompt_file
from tests.helpers.tiny_models import make_tokenizer

MESSAGES = [{"role": "user", "content": "1+1=?"}]


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


def test_a_row_becomes_a_sample_with_prompt_label_metadata_and_tools(write):
    path = write({"q": "1+1=?", "a": "2", "extra": {"level": "easy"}, "tools": [{"name": "add"}]})
    sample = Dataset(path, input_key="q", label_key="a", metadata_key="extra")[0]
    assert (sample.prompt, sample.label) == ("1+1=?", "2")
    assert sample.metadata == {"level": "easy", "tools": [{"name": "add"}]}
    assert sample.tokens == [] and sample.reward is None


@pytest.mark.parametrize(
    ("value", "label"), [("x", "x"), (34, "34"), (0.5, "0.5"), (True, "true"), (10**30, f"{10**30}")]
)
def test_a_label_is_the_text_of_any_json_scalar(write, value, label):
    assert Dataset(write({"input": "q", "a": value}), label_key="a")[0].label == label


def test_columns_of_verl_are_read_through_keys_that_lead_into_objects(write):
    row = {
        "data_source": "gsm8k", "prompt": MESSAGES, "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 3},
    }  # fmt: skip
    keys = {"input_key": "prompt", "label_key": "reward_model.ground_truth", "metadata_key": "extra_info"}
    sample = Dataset(write(row), **keys, metadata_columns=("data_source",))[0]
    assert (sample.prompt, sample.label) == (MESSAGES, "2")
    assert sample.metadata == {"index": 3, "data_source": "gsm8k"}


@pytest.mark.parametrize("completion", ["2", [{"role": "assistant", "content": "2"}]])
def test_a_completion_enters_the_metadata_and_is_of_the_kind_of_its_prompt(write, completion):
    keys = {"input_key": "prompt", "completion_key": "completion"}
    prompt, other = (MESSAGES, "1+1=?") if isinstance(completion, list) else ("1+1=?", MESSAGES)
    sample = Dataset(write({"prompt": prompt, "completion": completion}), **keys)[0]
    assert (sample.prompt, sample.metadata) == (prompt, {"completion": completion})
    with pytest.raises(ValueError, match="jsonl:1: 'prompt' and 'completion' must both be text or both"):
        Dataset(write({"prompt": other, "completion": completion}), **keys)
    with pytest.raises(ValueError, match="jsonl:1: no key 'completion'.*Set --completion-key"):
        Dataset(write({"prompt": prompt}), **keys)


def test_a_key_with_a_dot_may_be_that_of_a_column(write):
    assert Dataset(write({"a.b": "flat", "a": {"b": "deep"}}), input_key="a.b")[0].prompt == "flat"


@pytest.mark.parametrize("row", [{"input": "q"}, {"input": "q", "a": 1}, {"input": "q", "a": {"c": 1}}])
def test_a_path_that_leads_nowhere_is_named(write, row):
    with pytest.raises(ValueError, match=r"jsonl:1: no key 'a\.b'.*Set --label-key"):
        Dataset(write(row), label_key="a.b")
    with pytest.raises(ValueError, match=r"no key 'a\.b'.*Set --metadata-columns"):
        Dataset(write(row), metadata_columns=("a.b",))


def test_metadata_and_tools_may_be_json_in_a_string(write):
    sample = Dataset(write({"input": "q", "metadata": '{"level": 1}', "tools": '[{"name": "add"}]'}))[0]
    assert sample.metadata == {"level": 1, "tools": [{"name": "add"}]}


def test_messages_stay_messages_without_a_chat_template(write):
    assert Dataset(write({"input": MESSAGES}))[0].prompt == MESSAGES


def test_the_chat_template_renders_messages_and_takes_text_as_one_user_message(write):
    dataset = Dataset(write({"input": MESSAGES}, {"input": "1+1=?"}), make_tokenizer(), apply_chat_template=True)
    assert dataset[0].prompt == "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    assert dataset[1].prompt == dataset[0].prompt


def test_parquet_gives_the_samples_of_the_same_jsonl(write, tmp_path):
    rows = [
        {"input": MESSAGES, "label": "2", "metadata": {"level": 1}},
        {
            "input": [*MESSAGES, {"role": "assistant", "content": "2", "step_loss_mask": 0}],
            "label": "2",
            "metadata": {"level": 2},
        },
    ]
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    from_jsonl, from_parquet = Dataset(write(*rows), label_key="label"), Dataset(str(parquet), label_key="label")
    assert from_parquet.samples == from_jsonl.samples


def test_prompts_longer_than_the_limit_are_dropped_and_counted(write, caplog):
    tokenizer = make_tokenizer()
    texts = ["hello " * (number % 47 + 1) for number in range(3000)]  # more than one batch of the tokenizer
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    limit = sorted(lengths)[1500]
    dataset = Dataset(write(*({"input": text} for text in texts)), tokenizer, max_prompt_len=limit)
    expected = [text for text, length in zip(texts, lengths, strict=True) if length <= limit]
    assert [sample.prompt for sample in dataset.samples] == expected
    assert f"{3000 - len(expected)} of 3000 prompts dropped, longer than {limit} tokens" in caplog.text


def test_the_limit_counts_the_tokens_that_the_chat_template_adds(write):
    tokenizer = make_tokenizer()
    rendered = "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    length = len(tokenizer(rendered)["input_ids"])
    path = write({"input": "1+1=?"})
    assert len(Dataset(path, tokenizer, max_prompt_len=length, apply_chat_template=True)) == 1
    with pytest.raises(ValueError, match=f"all 1 prompts are longer than {length - 1} tokens"):
        Dataset(path, tokenizer, max_prompt_len=length - 1, apply_chat_template=True)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(write):
    path = write(*({"input": str(n)} for n in range(50)))
    dataset, again = Dataset(path, seed=1), Dataset(path, seed=1)
    dataset.shuffle(3)
    first = [sample.prompt for sample in dataset.samples]
    dataset.shuffle(4)
    second = [sample.prompt for sample in dataset.samples]
    again.shuffle(3)
    assert [sample.prompt for sample in again.samples] == first != second
    assert sorted(first, key=int) == sorted(second, key=int) == [str(n) for n in range(50)]
    other = Dataset(path, seed=3)
    other.shuffle(1)
    assert [sample.prompt for sample in other.samples] != first


def test_the_order_of_an_epoch_is_fixed_for_ever(write):
    dataset = Dataset(write(*({"input": str(n)} for n in range(8))), seed=42)
    dataset.shuffle(0)
    assert "".join(str(sample.prompt) for sample in dataset.samples) == "12576034"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "q", "a": 1}, r"no key 'input', it has \['a', 'text'\]. Set --input-key"),
        ({"input": "q"}, r"no key 'a', it has \['input'\]. Set --label-key"),
        ({"input": 1, "a": 1}, "'input' must be text or a list of messages, got 1"),
        ({"input": "", "a": 1}, "'input' must be text or a list of messages, got ''"),
        ({"input": [], "a": 1}, "'input': the list of messages is empty"),
        ({"input": [{"role": "user"}], "a": 1}, "'input': message 0 lacks content"),
        ({"input": "q", "a": [1]}, "'a' must be a string, a number or a boolean"),
        ({"input": "q", "a": None}, "'a' must be a string, a number or a boolean"),
        ({"input": "q", "a": 1, "metadata": [1]}, "'metadata' must be a dict"),
        ({"input": "q", "a": 1, "metadata": "{"}, "'metadata' is text that is not valid JSON"),
        ({"input": "q", "a": 1, "tools": {}}, "'tools' must be a list"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_reason(write, row, reason):
    path = write({"input": "q", "a": 1}, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {reason}"):
        check_prompt_file(path, label_key="a")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {reason}"):
        Dataset(path, label_key="a")


def test_a_row_that_the_template_refuses_is_named(write):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    path = write({"input": MESSAGES}, {"input": [{"role": "system", "content": "be brief"}]})
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*no system"):
        Dataset(path, tokenizer, apply_chat_template=True)


def test_an_empty_file_and_an_empty_slice_are_refused(write):
    path = write({"input": "q"})
    for empty in (write(), f"{path}@[5:]"):
        with pytest.raises(ValueError, match="holds no prompts"):
            check_prompt_file(empty)
        with pytest.raises(ValueError, match="holds no prompts"):
            Dataset(empty)


def test_a_check_counts_the_prompts(write):
    assert check_prompt_file(write({"input": "a"}, {"input": "b"})) == 2


def test_importing_the_dataset_loads_no_torch_and_no_transformers():
    code = "import sys, slime.utils.data; print({'torch', 'transformers', 'pyarrow', 'jinja2'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()", result.stderr
