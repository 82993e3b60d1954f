"""A checkpoint of a well-known shape with random weights, in Hugging Face format: to try scripts without a download.

    python scripts/random_checkpoint.py qwen3-4B ./Qwen3-4B [--layers 2] [--dtype bfloat16]

The tokenizer knows bytes and the ChatML frame only; speed and memory are those of the real model, answers are noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 128}
LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
GLM4 = {"vocab_size": 151552, "rms_norm_eps": 1e-5, "head_dim": 128, "attention_bias": True, "pad_token_id": None}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _dense(family: dict[str, Any], *sizes: int, tied: bool) -> dict[str, Any]:
    return family | dict(zip(SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied}


def _llama3_rope(factor: float) -> dict[str, Any]:
    """Llama 3.1 and later: contexts of 131,072 tokens."""
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor} | frequencies
    return {"rope_parameters": rope, "max_position_embeddings": 131072}


def _glm45(num_experts: int, expert_size: int, dense_layers: int, *, qk_norm: bool, scale: float) -> dict[str, Any]:
    experts = {"n_routed_experts": num_experts, "moe_intermediate_size": expert_size, "num_experts_per_tok": 8}
    layers = {"first_k_dense_replace": dense_layers, "use_qk_norm": qk_norm, "routed_scaling_factor": scale}
    return GLM4 | experts | layers | {"model_type": "glm4_moe", "rope_theta": 1e6, "n_shared_experts": 1}


def _qwen3_experts(size: int) -> dict[str, Any]:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": size, "norm_topk_prob": True}
    return QWEN3 | experts | {"model_type": "qwen3_moe"}


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
    | {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
}
QWEN2_UNTIED = QWEN2 | {"vocab_size": 152064}
LLAMA31, LLAMA32 = LLAMA3 | _llama3_rope(8.0), LLAMA3 | _llama3_rope(32.0)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5B": _dense(QWEN2, 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5B": _dense(QWEN2, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3B": _dense(QWEN2, 2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7B": _dense(QWEN2_UNTIED, 3584, 18944, 28, 28, 4, tied=False),
    "qwen2.5-14B": _dense(QWEN2_UNTIED, 5120, 13824, 48, 40, 8, tied=False),
    "qwen2.5-32B": _dense(QWEN2_UNTIED, 5120, 27648, 64, 40, 8, tied=False),
    "qwen2.5-72B": _dense(QWEN2_UNTIED, 8192, 29568, 80, 64, 8, tied=False),
    "qwen3-0.6B": _dense(QWEN3, 1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7B": _dense(QWEN3, 2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4B": _dense(QWEN3, 2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8B": _dense(QWEN3, 4096, 12288, 36, 32, 8, tied=False),
    "qwen3-14B": _dense(QWEN3, 5120, 17408, 40, 40, 8, tied=False),
    "qwen3-32B": _dense(QWEN3, 5120, 25600, 64, 64, 8, tied=False),
    "qwen3-30B-A3B": _dense(_qwen3_experts(768), 2048, 6144, 48, 32, 4, tied=False),
    "qwen3-235B-A22B": _dense(_qwen3_experts(1536), 4096, 12288, 94, 64, 4, tied=False),
    "glm4-9B": _dense(GLM4 | {"model_type": "glm4"}, 4096, 13696, 40, 32, 2, tied=False),
    "glm4.5-106B-A12B": _dense(_glm45(128, 1408, 1, qk_norm=False, scale=1.0), 4096, 10944, 46, 96, 8, tied=False),
    "glm4.5-355B-A32B": _dense(_glm45(160, 1536, 3, qk_norm=True, scale=2.5), 5120, 12288, 92, 96, 8, tied=False),
    "llama3-8B": _dense(LLAMA3, 4096, 14336, 32, 32, 8, tied=False),
    "llama3-70B": _dense(LLAMA3, 8192, 28672, 80, 64, 8, tied=False),
    "llama3.1-8B": _dense(LLAMA31, 4096, 14336, 32, 32, 8, tied=False),
    "llama3.1-70B": _dense(LLAMA31, 8192, 28672, 80, 64, 8, tied=False),
    "llama3.2-1B": _dense(LLAMA32, 2048, 8192, 16, 32, 8, tied=True),
    "llama3.2-3B": _dense(LLAMA32, 3072, 8192, 28, 24, 8, tied=True),
    "deepseek-v3": _dense(DEEPSEEK_V3, 7168, 18432, 61, 128, 128, tied=False),
}


def main() -> None:
    """Writes the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write_checkpoint(args.shape, args.directory, num_layers=args.layers, dtype=args.dtype, seed=args.seed)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(args.directory)


def write_checkpoint(
    shape: str, directory: Path, *, num_layers: int | None = None, dtype: str = "bfloat16", seed: int = 0
) -> None:
    """A model of `SHAPES[shape]` and a byte-level tokenizer. A directory with weights in it is refused."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from slime.cli.quickstart_data import make_tokenizer

    if (directory / "config.json").exists():
        raise FileExistsError(f"{directory} holds a model already; nothing was written")
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    fields = SHAPES[shape] | ids | ({"num_hidden_layers": num_layers} if num_layers is not None else {})
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
