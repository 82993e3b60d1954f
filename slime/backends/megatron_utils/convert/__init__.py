"""HF directories <-> Megatron checkpoints, on a CPU, tensor by tensor; Megatron need not be installed."""

from slime.backends.megatron_utils.convert.hf_to_torch_dist import hf_to_torch_dist
from slime.backends.megatron_utils.convert.to_hf import megatron_to_hf

__all__ = ["hf_to_torch_dist", "megatron_to_hf"]
