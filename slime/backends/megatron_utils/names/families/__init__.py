"""Every family, by the `model_type` of its config.json. One file each; docs/add-a-model.md shows how to add one."""

from slime.backends.megatron_utils.names.families import deepseek_v3, glm4, glm4_moe, llama, qwen2, qwen3, qwen3_moe
from slime.backends.megatron_utils.names.family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "glm4": glm4.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
}
