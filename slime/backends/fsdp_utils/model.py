"""A Hugging Face causal LM that answers with per-token log-probs instead of logits, sharded by FSDP2.

Shapes: N packed tokens, T response tokens, O of them this rank's (all, but for context parallelism), V vocabulary,
E model width.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from slime.backends.fsdp_utils import attention
from slime.backends.fsdp_utils.arguments import FSDPConfig
from slime.backends.fsdp_utils.context_parallel import ContextGroup
from slime.backends.fsdp_utils.prompt_sharing import shared_prompts
from slime.backends.shared.routing_replay import RoutingReplay
from slime.backends.shared.target_log_probs import LogitRule, target_log_probs
from slime.data.packed import PackedBatch
from slime.training.backend import TokenOutputs, Wants
from slime.utils.device import to_device


class TokenModel(nn.Module):
    """Log-probs and entropy of the response tokens of a packed batch; logits exist for one chunk at a time.

    A loss that asks for the logits themselves has them all at once.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        temperature: float,
        chunk_size: int,
        share_prompts: bool = True,
        context: ContextGroup | None = None,
    ) -> None:
        """temperature: logits are divided by it. chunk_size: tokens whose logits are held at once.

        share_prompts: compute equal prompts of a pack once, where attention is ours. context: who shares its tokens.
        """
        super().__init__()
        if not isinstance(lm.get_output_embeddings(), nn.Linear):
            raise ValueError(f"{type(lm).__name__} has no linear output head; the FSDP backend cannot train it")
        self.lm = lm
        self.rule = LogitRule(temperature, _logit_softcap(lm), chunk_size)
        self.share_prompts = share_prompts
        self.context = context
        self.replay: RoutingReplay | None = None

    def forward(self, batch: PackedBatch, wants: Wants) -> TokenOutputs:
        """Outputs [T] for `batch`, which lies on the model's device."""
        head = partial(self._head, wants=wants)
        return target_outputs(
            self.lm.get_decoder(),
            batch,
            head,
            share_prompts=self.share_prompts,
            context=self.context,
            replay=self.replay,
        )

    def _head(self, hidden_O: Tensor, targets_O: Tensor, *, wants: Wants) -> TokenOutputs:
        head = cast(nn.Linear, self.lm.get_output_embeddings())
        if wants.logits:
            logits_OV = self._logits(head(hidden_O).float())
            log_probs_O, entropy_O = _of_targets(logits_OV, targets_O, wants.entropy)
            return TokenOutputs(log_probs_O, entropy_O, logits=logits_OV)
        log_probs_O, entropy_O = target_log_probs(hidden_O, head, targets_O, self.rule, entropy=wants.entropy)
        return TokenOutputs(log_probs_O, entropy_O)

    def _logits(self, logits_TV: Tensor) -> Tensor:
        if self.rule.softcap is not None:
            logits_TV = self.rule.softcap * torch.tanh(logits_TV / self.rule.softcap)
        return logits_TV if self.rule.temperature == 1.0 else logits_TV / self.rule.temperature


def target_outputs(
    decoder: nn.Module,
    batch: PackedBatch,
    head: Callable[[Tensor, Tensor], TokenOutputs],
    *,
    share_prompts: bool,
    context: ContextGroup | None,
    replay: RoutingReplay | None = None,
) -> TokenOutputs:
    """What `head` says of each response token, [T], from (hidden states before them [O, E], these tokens [O]).

    share_prompts: compute equal prompts once, where attention is ours. context: who shares the tokens; it must be ours.
    replay: routers that follow the experts which `batch` knows; of equal prompts the first one's.
    """
    is_packed = cast(PreTrainedModel, decoder).config._attn_implementation == attention.NAME
    host, device = batch.on_host or batch, batch.input_ids.device
    sharing = shared_prompts(host) if share_prompts and is_packed else None
    source_T = host.target_index - 1
    first = torch.arange(len(host.input_ids))
    if context is not None:
        sharing = context.deal(sharing, len(first))
    if sharing is not None:
        first = sharing.first if context is None else context.share(sharing.first)
        source_T = sharing.place[source_T]
        sharing = sharing.to(device)
    own = None if context is None else (source_T // len(first) == context.rank).nonzero()[:, 0]
    source_O = to_device(source_T if own is None else source_T[own] % len(first), device)
    first = to_device(first, device)
    is_trained = torch.is_grad_enabled()
    with replay.following(batch, first, device=device, is_trained=is_trained) if replay else nullcontext():
        output = decoder(
            input_ids=batch.input_ids[first][None],
            position_ids=batch.position_ids[first][None],
            attention_mask=None,
            use_cache=False,  # with a cache transformers would take the pack for one sequence
            packing=attention.Packing(batch.sequence_lengths, device, sharing, context),
        )
    hidden = cast(Tensor, output.last_hidden_state).squeeze(0)
    if context is None or own is None:
        return head(hidden.index_select(0, source_O), batch.targets)
    places = to_device(own, device)
    return context.complete(head(hidden.index_select(0, source_O), batch.targets[places]), places, len(source_T))


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


def load_causal_lm(
    directory: str,
    *,
    attn_implementation: str,
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a Hugging Face directory in float32 on the CPU. experts_implementation: None: transformers' own.

    Raises ValueError, naming the tensor, where weights are missing or do not fit the config.
    """
    attention.register_packed_attention()
    loader: Any = AutoModelForCausalLM
    experts = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    with _errors_that_name(directory):
        lm, info = loader.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **experts,
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


class ShardOptions(NamedTuple):
    """How FSDP2 holds a model and computes with it."""

    mesh: DeviceMesh
    mp_policy: MixedPrecisionPolicy
    offload_policy: OffloadPolicy

    def float32(self) -> ShardOptions:
        """The same in float32 throughout."""
        return self._replace(mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))


def shard_options(fsdp: FSDPConfig, mesh: DeviceMesh, device: torch.device, *, dtype: torch.dtype) -> ShardOptions:
    """What the settings say. dtype: of computation. Host memory is page-locked where there is a GPU."""
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if fsdp.fsdp_cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return ShardOptions(mesh, policy, offload)


def shard(model: nn.Module, layers: list[nn.Module], options: ShardOptions, *, reshard_after_forward: bool) -> None:
    """FSDP2, in place: one group for each of the `layers`, one for the rest (embeddings, final norm, head).

    Each group moves to the device, or the shard of it to the host, before the next.
    """
    for layer in layers:
        fully_shard(layer, **options._asdict(), reshard_after_forward=reshard_after_forward)
    fully_shard(model, **options._asdict())


def reshard(model: nn.Module) -> None:
    """Free gathered weights: FSDP keeps some for a backward, which does not come after a forward alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
