import pytest

from slime.utils.processing_utils import load_processor, load_tokenizer
from tests.helpers.tiny_models import make_tokenizer


def test_a_saved_tokenizer_is_loaded_with_its_chat_template(tmp_path):
    saved = make_tokenizer()
    saved.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("what is 17 + 25 ?")["input_ids"] == saved("what is 17 + 25 ?")["input_ids"]
    assert tokenizer.chat_template == saved.chat_template


@pytest.mark.parametrize(("load", "kind"), [(load_tokenizer, "tokenizer"), (load_processor, "processor")])
def test_a_missing_and_an_empty_folder_are_refused_by_name(tmp_path, load, kind):
    with pytest.raises(ValueError, match=f"{kind}: '.*none' is not a directory"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=f"{kind}: cannot be loaded from"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_file_is_refused_by_name(tmp_path, content):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer: cannot be loaded from .*\\(.+\\)"):
        load_tokenizer(tmp_path)
