"""The model: loaded from a Hugging Face folder, run over packed tokens with our attention and cache.

Legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.attention import MIN_ROWS, PagedAttention
from slime.engine.embedded.experts import exact_experts
from slime.engine.embedded.kv_cache import PAGE_SIZE, KVCache
from slime.engine.embedded.plan import Batch, Limits, make_plan
from slime.engine.embedded.refusal import Refused
from slime.engine.embedded.routed_experts import RoutedExperts
from slime.engine.embedded.shares import cut

logger = logging.getLogger(__name__)

ROW_MULTIPLE = 16
"""Rows of a pass and of logits are padded to a multiple: below about 12 a matrix product sums in another order."""

KEY_BYTES = 4 << 20
"""Keys and values that a CPU gathers for one decode block, so that they are still in its cache when they are used."""

DEFAULT_CPU_CACHE_BYTES = 2 << 30
SMALL_MODEL_PARAMETERS = 8_000_000
MIN_SHARE_WORK = 250_000_000
"""Floating-point operations worth a thread of their own: Python takes milliseconds around them, a thread at a time."""

EXACT_EXPERTS = "slime_exact"
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}

_attention_names = itertools.count()


class ModelRunner:
    """A model with its key-value cache."""

    def __init__(self, args: ServerArgs) -> None:
        self.device = torch.device(_resolve_device(args.device))
        config = _load_config(args)
        self.model = _load_model(args, config, self.device)
        self._num_parameters = int(self.model.num_parameters(exclude_embeddings=True))
        self._num_threads, self._max_shares = _threads_and_shares(args, self.model)
        self.set_threads()
        self._workers = ThreadPoolExecutor(
            self._max_shares, thread_name_prefix="share", initializer=torch.set_num_threads, initargs=(1,)
        )
        self.text_config = self.model.config.get_text_config()
        self.dtype = self.model.dtype
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        self.context_length = _context_length(args, self.text_config)
        self.is_exact = self.dtype == torch.float32 and (
            self.device.type == "cpu" or args.enable_deterministic_inference
        )
        self._takes_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._attention_name = f"slime_paged_{next(_attention_names)}"
        self.routed: RoutedExperts | None = None
        self.use_cache(self._make_cache(args))
        if self.is_exact and self.model._can_set_experts_implementation():
            ALL_EXPERTS_FUNCTIONS.register(EXACT_EXPERTS, exact_experts)
            self.model.set_experts_implementation(EXACT_EXPERTS)
        self.check_attention()
        if args.enable_return_routed_experts:
            self.routed = RoutedExperts(self.model, self.cache.num_pages)

    def set_threads(self) -> None:
        """Sets the CPU threads of operations, for the calling thread: OpenMP keeps a number for each that calls it."""
        torch.set_num_threads(self._num_threads)

    @torch.inference_mode()
    def forward(self, batch: Batch, rows: list[int]) -> Tensor:
        """Runs a batch and returns float32 logits [R, V] of the tokens of the pass numbered by `rows`."""
        work = 2 * self._num_parameters * len(batch.tokens)
        count = min(self._max_shares, len(batch.rows), work // MIN_SHARE_WORK)
        if count <= 1:
            return self._forward_share(batch, rows)
        shares = cut(batch, rows, count)
        others = [self._workers.submit(self._forward_share, share.batch, share.rows) for share in shares[1:]]
        try:
            parts = [self._forward_share(shares[0].batch, shares[0].rows)]
        finally:
            wait(others)
        parts += [other.result() for other in others]
        logits = parts[0].new_empty(len(rows), parts[0].shape[1])
        for share, part in zip(shares, parts, strict=True):
            logits[torch.from_numpy(share.places).to(self.device)] = part
        return logits

    @torch.inference_mode()
    def _forward_share(self, batch: Batch, rows: list[int]) -> Tensor:
        plan = make_plan(batch, self._limits, device=self.device)
        self._attention.plan = plan
        input_ids = torch.tensor([batch.tokens + [0] * (len(plan.positions) - plan.num_tokens)], device=self.device)
        kept = torch.tensor(rows + [0] * (-len(rows) % ROW_MULTIPLE), dtype=torch.long, device=self.device)
        options: dict[str, Any] = {"logits_to_keep": kept} if self._takes_rows else {}
        with nullcontext() if self.routed is None else self.routed.watching(plan):
            output = self.model(input_ids=input_ids, position_ids=plan.positions[None], use_cache=False, **options)
        logits = output.logits[0]
        if not self._takes_rows:
            logits = logits[kept]
        return logits[: len(rows)].float()

    def use_cache(self, cache: KVCache) -> None:
        """Puts another cache in the place of the one made at the start."""
        self.cache = cache
        if self.routed is not None:
            self.routed.allocate(cache.num_pages)
        page_bytes = cache.num_bytes // (cache.num_pages * int(self.text_config.num_hidden_layers))
        self._limits = Limits(
            row_multiple=ROW_MULTIPLE,
            num_query_heads=int(self.text_config.num_attention_heads),
            min_rows=MIN_ROWS,
            max_decode_pages=max(1, KEY_BYTES // page_bytes) if self.device.type == "cpu" else sys.maxsize,
        )
        self._attention = PagedAttention(cache, exact=self.is_exact)
        ALL_ATTENTION_FUNCTIONS.register(self._attention_name, self._attention)

    @torch.inference_mode()
    def check_attention(self) -> None:
        """Compares a few tokens in two passes against the model's own attention in one, and switches to ours.

        Raises Refused where they differ: a model that keeps state elsewhere, or biases its scores, is found here.
        """
        tokens = [token % self.vocab_size for token in range(7, 7 + 11)]
        self.model.set_attn_implementation("eager")
        reference = self.model(input_ids=torch.tensor([tokens], device=self.device), use_cache=False).logits[0].float()
        self.model.set_attn_implementation(self._attention_name)
        pages = self.cache.allocate(1)
        parts = []
        for start, end in ((0, 6), (6, 10), (10, 11)):
            row, table = np.array([0]), np.array([pages])
            batch = Batch(tokens[start:end], row, np.array([start]), np.array([end]), table)
            parts.append(self.forward(batch, list(range(end - start))))
        self.cache.free(pages)
        gap = (torch.cat(parts).log_softmax(-1) - reference.log_softmax(-1)).abs().mean().item()
        limit = 1e-3 if self.dtype == torch.float32 else 0.1
        if not gap <= limit and bool(reference.isfinite().all()):
            name = type(self.model).__name__
            raise Refused(
                f"{name} cannot be served by the embedded engine: its log-probabilities differ from the model's own by "
                f"{gap:.2g} on average, so it does more than causal attention over a cache. Use SGLang for it."
            )

    def _make_cache(self, args: ServerArgs) -> KVCache:
        config = self.text_config
        num_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        head_dim = _head_dim(config)
        layers = int(config.num_hidden_layers)
        bytes_per_token = 2 * layers * num_heads * head_dim * self.dtype.itemsize
        num_tokens = args.max_total_tokens or _cache_tokens(args, self, bytes_per_token)
        if num_tokens < PAGE_SIZE:
            raise Refused(f"the free memory holds {num_tokens} tokens of key-value cache; raise --mem-fraction-static.")
        return KVCache(layers, num_heads, head_dim, num_tokens=num_tokens, dtype=self.dtype, device=self.device)


def _head_dim(config: Any) -> int:
    """Of the cache: with latent attention queries and keys are of another width than values."""
    if getattr(config, "kv_lora_rank", None):
        return int(max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim))
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _cache_tokens(args: ServerArgs, runner: ModelRunner, bytes_per_token: int) -> int:
    """Tokens that fit the allowed share of the free memory; at most twice what all running requests can use."""
    if runner.device.type == "cuda":
        allowed = int(torch.cuda.mem_get_info(runner.device)[0] * args.mem_fraction_static)
    else:
        allowed = min(int(psutil.virtual_memory().available * args.mem_fraction_static), DEFAULT_CPU_CACHE_BYTES)
    return min(allowed // bytes_per_token, 2 * args.max_running_requests * runner.context_length)


def _resolve_device(device: str) -> str:
    if device != "auto":
        if device == "cuda" and not torch.cuda.is_available():
            raise Refused("--device cuda was asked for, but torch sees no GPU.")
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_config(args: ServerArgs) -> Any:
    folder = Path(args.model_path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise Refused(f"{folder / 'config.json'} cannot be read: {error}") from error
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ()) - SERVED_LAYER_TYPES
    if layer_types:
        raise Refused(
            f"{config.model_type} cannot be served by the embedded engine: it has layers of type "
            f"{', '.join(sorted(layer_types))}, which need state beyond a key-value cache. Use SGLang for it."
        )
    return config


def _load_model(args: ServerArgs, config: Any, device: torch.device) -> PreTrainedModel:
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model_path, config=config, dtype=dtype, trust_remote_code=args.trust_remote_code
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise Refused(f"the model in {args.model_path} cannot be loaded: {error}") from error
    if not model._supports_attention_backend:
        raise Refused(
            f"{type(model).__name__} cannot be served by the embedded engine: its attention cannot be replaced "
            "(it does not use transformers' attention interface). Use SGLang for it."
        )
    model.requires_grad_(False)
    return model.eval().to(device)


def _threads_and_shares(args: ServerArgs, model: PreTrainedModel) -> tuple[int, int]:
    """How many CPU threads compute an operation, and how many compute shares of a pass.

    A small model's operations run in one thread each, and its passes in shares; those of a large one, which would read
    all weights once a share, in all threads.
    """
    num_threads = args.num_threads or torch.get_num_threads()
    return (1, num_threads) if model.device.type == "cpu" and _can_share(model) else (num_threads, 1)


def _can_share(model: PreTrainedModel) -> bool:
    """Whether a model is small, and no module of it changes with the positions of a pass (as some rotary ones)."""
    rope_types = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    is_pure = not any("dynamic" in kind or "longrope" in kind for kind in rope_types)
    return is_pure and model.num_parameters(exclude_embeddings=True) < SMALL_MODEL_PARAMETERS


def _context_length(args: ServerArgs, config: Any) -> int:
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    if args.context_length is not None and args.context_length > longest:
        raise Refused(f"--context-length {args.context_length} exceeds the model's {longest} tokens.")
    return args.context_length or longest


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config, the config and the tokenizer."""
    found: set[int] = set()
    sources = (model.generation_config, model.config, model.config.get_text_config(), tokenizer)
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(np.atleast_1d(value).tolist())
    return frozenset(found)
