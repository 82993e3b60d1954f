"""Tokenizers with the chat templates that models are shipped with, taken from the package trl."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_models import make_tokenizer

# Of these, as in the real tokenizers, only those that begin and end a text count as special.
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
DEEPSEEK_TURNS = ["<｜User｜>", "<｜Assistant｜>"]
DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def shipped_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the template `name`, such as "qwen3"; skips the test where trl is not installed."""
    trl = pytest.importorskip("trl", minversion="1.0", reason="the templates are those of the package trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this release of trl has no template {name}")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = path.read_text()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS + DEEPSEEK_TURNS])
    if name.startswith("deepseek"):
        tokenizer.add_special_tokens({"bos_token": DEEPSEEK_BOS, "eos_token": DEEPSEEK_EOS})
    return tokenizer
