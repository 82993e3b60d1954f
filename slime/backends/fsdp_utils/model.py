"""A Hugging Face causal LM that answers with per-token log-probs instead of logits, sharded by FSDP2.

Shapes: N packed tokens, T response tokens, C tokens of one chunk, V vocabulary, E model width.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from slime.backends.fsdp_utils import attention
from slime.backends.fsdp_utils.prompt_sharing import shared_prompts
from slime.backends.shared.target_log_probs import LogitRule, target_log_probs
from slime.data.packed import PackedBatch
from slime.training.backend import TokenOutputs, Wants


class TokenModel(nn.Module):
    """Log-probs and entropy of the response tokens of a packed batch; logits exist for one chunk at a time.

    A loss that asks for the logits themselves has them all at once.
    """

    def __init__(self, lm: PreTrainedModel, *, temperature: float, chunk_size: int, share_prompts: bool = True) -> None:
        """temperature: logits are divided by it. chunk_size: tokens whose logits are held at once.

        share_prompts: compute equal prompts of a pack once, where attention is ours.
        """
        super().__init__()
        if not isinstance(lm.get_output_embeddings(), nn.Linear):
            raise ValueError(f"{type(lm).__name__} has no linear output head; the FSDP backend cannot train it")
        self.lm = lm
        self.rule = LogitRule(temperature, _logit_softcap(lm), chunk_size)
        self.share_prompts = share_prompts

    def forward(self, batch: PackedBatch, wants: Wants) -> TokenOutputs:
        """Outputs [T] for `batch`, which lies on the model's device."""
        hidden_T = target_hidden(self.lm.get_decoder(), batch, share_prompts=self.share_prompts)
        head = cast(nn.Linear, self.lm.get_output_embeddings())
        if wants.logits:
            logits_TV = self._logits(head(hidden_T).float())
            log_probs_T, entropy_T = _of_targets(logits_TV, batch.targets, wants.entropy)
            return TokenOutputs(log_probs_T, entropy_T, logits=logits_TV)
        log_probs_T, entropy_T = target_log_probs(hidden_T, head, batch.targets, self.rule, entropy=wants.entropy)
        return TokenOutputs(log_probs_T, entropy_T)

    def _logits(self, logits_TV: Tensor) -> Tensor:
        if self.rule.softcap is not None:
            logits_TV = self.rule.softcap * torch.tanh(logits_TV / self.rule.softcap)
        return logits_TV if self.rule.temperature == 1.0 else logits_TV / self.rule.temperature


def target_hidden(decoder: nn.Module, batch: PackedBatch, *, share_prompts: bool) -> Tensor:
    """[T, E] what predicts each response token.

    share_prompts: compute equal prompts once, where attention is ours.
    """
    is_packed = cast(PreTrainedModel, decoder).config._attn_implementation == attention.NAME
    sharing = shared_prompts(batch) if share_prompts and is_packed else None
    input_ids, position_ids, source_T = batch.input_ids, batch.position_ids, batch.target_index - 1
    if sharing is not None:
        input_ids, position_ids = input_ids[sharing.first], position_ids[sharing.first]
        source_T = sharing.place[source_T]
    output = decoder(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=None,
        use_cache=False,  # with a cache transformers would take the pack for one sequence
        packing=attention.Packing(batch.sequence_lengths, batch.input_ids.device, sharing),
    )
    return cast(Tensor, output.last_hidden_state)[0].index_select(0, source_T)


def _of_targets(logits_TV: Tensor, targets_T: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T] of the targets, and entropy [T] where it is wanted."""
    log_probs_TV = logits_TV.log_softmax(-1)
    log_probs_T = log_probs_TV.gather(-1, targets_T[:, None])[:, 0]
    return log_probs_T, -(log_probs_TV.exp() * log_probs_TV).sum(-1) if entropy else None


def _logit_softcap(lm: PreTrainedModel) -> float | None:
    """The cap on logits; raises ValueError for models that change logits in ways this wrapper does not repeat."""
    config = lm.config.get_text_config().to_dict()
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if config.get(name) not in (None, 1, 1.0):
            raise ValueError(f"{type(lm).__name__} scales its logits ({name}); the FSDP backend does not support that")
    return config.get("final_logit_softcapping")


def compute_dtype(bf16: bool | None, device: torch.device) -> torch.dtype:
    """Of parameters in forward and backward: bfloat16 where asked for, by default on GPUs. Else all is float32."""
    wants_bf16 = device.type == "cuda" if bf16 is None else bf16
    return torch.bfloat16 if wants_bf16 else torch.float32


def load_causal_lm(directory: str, *, attn_implementation: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a Hugging Face directory in float32 on the CPU.

    Raises ValueError, naming the tensor, where weights are missing or do not fit the config.
    """
    attention.register_packed_attention()
    loader: Any = AutoModelForCausalLM
    with _errors_that_name(directory):
        lm, info = loader.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{directory}: tensor {name} has shape {tuple(found)}, its config.json asks for {tuple(wanted)}"
        )
    if info["missing_keys"]:
        raise ValueError(f"{directory}: weights are missing, first {sorted(info['missing_keys'])[0]}")
    return cast(PreTrainedModel, lm)


def checkpoint_dtype(directory: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that a directory's config.json names, float32 where it names none."""
    with _errors_that_name(directory):
        dtype = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@contextmanager
def _errors_that_name(directory: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError, KeyError, ValueError, StrictDataclassError, SafetensorError) as error:
        raise ValueError(f"the model in {directory} cannot be loaded: {error}") from error


def empty_like(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config, float32, on the CPU. Its parameters hold anything; no random number is drawn."""
    with no_init_weights():
        twin = type(lm)._from_config(
            copy.deepcopy(lm.config), dtype=torch.float32, attn_implementation=lm.config._attn_implementation
        )
    twin.tie_weights()  # left out with the initialisation
    return cast(PreTrainedModel, twin)


def shard(model: nn.Module, layers: list[nn.Module], *, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """FSDP2, in place: one group for each of the `layers`, one for the rest (embeddings, final norm, head)."""
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def wants_compilation(torch_compile: bool | None, device: torch.device) -> bool:
    """Whether layers are compiled: where asked for, by default on GPUs where a C compiler is found."""
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return (device.type == "cuda" and has_compiler) if torch_compile is None else torch_compile


def compile_each(layers: list[nn.Module]) -> None:
    """torch.compile of each layer, for packs of any length. Attention stays as it is: its kernel is one already."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.compile(dynamic=True)


def enable_gradient_checkpointing(lm: PreTrainedModel) -> None:
    """Recompute each layer in the backward. transformers does so only where the layer itself is in training mode."""
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in decoder_layers(lm):
        layer.training = True


def decoder_layers(lm: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of the decoder: what transformers itself never splits."""
    names = set(lm._no_split_modules or [])
    layers = [module for module in lm.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"{type(lm).__name__} does not say what its layers are (_no_split_modules); cannot shard it")
    return layers
