"""What a model is, in numbers: everything that names, layouts and Megatron's model arguments are derived from."""

from __future__ import annotations

from dataclasses import dataclass


class NameMapError(ValueError):
    """A model, tensor or parameter that the tables do not know, or that is not what they say."""


@dataclass(frozen=True)
class MoE:
    """Experts of a layer and how tokens get to them."""

    num_experts: int
    top_k: int
    ffn_size: int  # of one expert
    shared_ffn_size: int = 0  # of all shared experts together; 0: none
    num_dense_layers: int = 0  # layers before the first with experts
    scores: str = "softmax"  # or "sigmoid"
    has_bias: bool = False  # a correction added to the scores where experts are chosen
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0  # of the experts' weights


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1)."""

    q_rank: int | None  # None: queries are projected without a low rank
    kv_rank: int
    nope_size: int  # parts of a head: without and with positions, and of values
    rope_size: int
    v_size: int


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. kind: "llama3" (factor alone) or "yarn"."""

    kind: str
    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelShape:
    """A decoder. Worked example, Qwen3-0.6B: 28 layers, hidden 1024, 16 heads of 128 in 8 groups, tied embeddings."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    num_heads: int
    num_groups: int  # key-value heads
    head_size: int
    norm_eps: float
    rotary_base: float
    tied: bool
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False  # norms after attention and after the MLP too
    moe: MoE | None = None
    mla: MLA | None = None
    num_mtp_layers: int = 0  # behind the others, for multi-token prediction: neither loaded nor trained

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer (from 0) is made of experts."""
        return self.moe is not None and layer >= self.moe.num_dense_layers

    def size(self, axis: str | int) -> int:
        """The length of an axis that tables name; a number is its own."""
        match axis:
            case int():
                return axis
            case "hidden":
                return self.hidden_size
            case "vocab":
                return self.vocab_size
            case "head":
                return self.head_size
            case "queries":
                return self.num_heads * self.head_size
            case "keys":
                return self.num_groups * self.head_size
            case "ffn":
                return self.ffn_size
            case "gate_and_up":
                return 2 * self.ffn_size
        return self._moe_size(axis) if self.moe is not None and axis in _MOE_AXES else self._mla_size(axis)

    def _moe_size(self, axis: str) -> int:
        assert self.moe is not None
        sizes = (self.moe.num_experts, self.moe.ffn_size, self.moe.shared_ffn_size)
        return sizes[_MOE_AXES.index(axis)]

    def _mla_size(self, axis: str) -> int:
        assert self.mla is not None, f"{self.family} has no axis {axis}"
        mla = self.mla
        return {
            "q_rank": mla.q_rank or 0,
            "kv_rank": mla.kv_rank,
            "kv_rank_and_rope": mla.kv_rank + mla.rope_size,
            "latent_queries": self.num_heads * (mla.nope_size + mla.rope_size),
            "latent_keys_values": self.num_heads * (mla.nope_size + mla.v_size),
            "latent_values": self.num_heads * mla.v_size,
        }[axis]


_MOE_AXES = ("experts", "expert_ffn", "shared_ffn")
