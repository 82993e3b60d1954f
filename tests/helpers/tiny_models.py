"""Tiny random checkpoints in Hugging Face format, made in code: no download, about 0.1 s each after the imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = ["hello world", "the answer is 42", "what is 17 + 25 ?", "0 1 2 3 4 5 6 7 8 9", "system user assistant"]


def make_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template: any text has tokens, a multi-byte character has several.

    vocab_size: 260 at least (256 bytes and 4 special tokens); merges fill what is left, as far as the training text
    goes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(architecture: str = "qwen3", **overrides: Any) -> dict[str, Any]:
    """Config fields of a tiny model: hidden 64, 2 layers, 4 query and 2 key-value heads of 16."""
    fields: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    if architecture.startswith("qwen3"):
        fields["head_dim"] = 16
    if architecture.endswith("_moe"):
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    if architecture == "deepseek_v3":
        fields |= {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16}
        fields |= {"qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "moe_intermediate_size": 32}
        fields |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    return fields | overrides


def make_tiny_model(
    path: str | Path, architecture: str = "qwen3", *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Writes a tiny random checkpoint with its tokenizer into the folder `path` and returns it.

    architecture: a `model_type` of transformers: qwen3, qwen2, llama, qwen3_moe, ...
    seed: of the random weights; two seeds make two models of one shape.
    dtype: torch's name of the weights' type.
    overrides: config fields, such as hidden_size=128, num_hidden_layers=4, tie_word_embeddings=True.
    """
    path = Path(path)
    fields = tiny_config(architecture, **overrides)
    tokenizer = make_tokenizer(min(fields["vocab_size"], 320))
    config = AutoConfig.for_model(
        architecture,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
