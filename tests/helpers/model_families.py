"""Tiny random models of every family that the Megatron name map knows, as transformers builds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_DENSE: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SIGMOID_EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
_LLAMA3_ROPE = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_theta": 1e4,
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4}
    | {"num_experts_per_tok": 2, "norm_topk_prob": True},
    "glm4": {"model_type": "glm4", "head_dim": 16, "attention_bias": True},
    "glm4_moe": {"model_type": "glm4_moe", "head_dim": 16, "attention_bias": True, "use_qk_norm": True}
    | _SIGMOID_EXPERTS,
    "deepseek_v3": {"model_type": "deepseek_v3", "rope_parameters": _YARN} | _SIGMOID_EXPERTS | _LATENT,
}


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A model of `CONFIGS[name]` in which no parameter (norms and biases too) is left at its initial constant."""
    config = AutoConfig.for_model(**_DENSE | CONFIGS[name] | more)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.data = torch.randn(buffer.shape) * 0.05  # float32, as published checkpoints hold it
    return model.eval()


def write_tiny_model(name: str, directory: Path, *, max_shard_size: str = "1GB", **more: Any) -> PreTrainedModel:
    """The model, saved as an HF directory."""
    model = tiny_model(name, **more)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def write_tiny_model_with_mtp(name: str, directory: Path, *, num_mtp_layers: int = 1, **more: Any) -> set[str]:
    """The same with layers for multi-token prediction behind the model's own. Returns their names."""
    write_tiny_model(name, directory, num_nextn_predict_layers=num_mtp_layers, **more)
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    last = _DENSE["num_hidden_layers"] - 1
    like = {key.removeprefix(f"model.layers.{last}."): value for key, value in tensors.items() if f"s.{last}." in key}
    embedding = tensors["model.embed_tokens.weight"]
    hidden = embedding.shape[1]
    like |= {"embed_tokens.weight": embedding, "shared_head.head.weight": embedding}
    like |= {key: torch.ones(hidden) for key in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    like |= {"eh_proj.weight": torch.ones(hidden, 2 * hidden)}
    layers = range(last + 1, last + 1 + num_mtp_layers)
    added = {f"model.layers.{layer}.{key}": torch.randn_like(value) for layer in layers for key, value in like.items()}
    edit_weights(directory, add=added)
    return set(added)


def edit_weights(directory: Path, *, add: dict[str, torch.Tensor] | None = None, remove: str | None = None) -> None:
    """Adds or removes tensors of a directory with one file of weights."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path) | (add or {})
    tensors.pop(remove or "", None)
    save_file(tensors, path, metadata={"format": "pt"})
