"""Which experts the tokens in the cache were sent to: kept by slot, as keys and values are, so that prefixes share it.

Legend: T tokens of a pass, L layers, K experts of a token; layers without experts have zeros.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slime.engine.embedded.kv_cache import PAGE_SIZE
from slime.engine.embedded.plan import Plan
from slime.engine.embedded.refusal import Refused

_EXPERTS = re.compile(r".*\blayers\.(\d+)\..*\bexperts")


class RoutedExperts:
    """Watches a model's layers of experts. Several threads may compute passes at once."""

    def __init__(self, model: PreTrainedModel, num_pages: int) -> None:
        """num_pages: of the cache. Raises Refused for a model without experts."""
        found = [(_EXPERTS.fullmatch(name), module) for name, module in model.named_modules()]
        layers = {int(match[1]): module for match, module in found if match is not None}
        if not layers:
            raise Refused(f"--enable-return-routed-experts: {type(model).__name__} has no experts.")
        self._layers = list(layers)
        config = model.config.get_text_config()
        self._shape = (int(config.num_hidden_layers), int(config.num_experts_per_tok))
        self.allocate(num_pages)
        self._passes = threading.local()
        for layer, module in layers.items():
            module.register_forward_pre_hook(partial(self._see, layer))

    def allocate(self, num_pages: int) -> None:
        """Room for a cache of that size, all forgotten. The system provides memory only as it is written."""
        self._table = np.zeros((num_pages * PAGE_SIZE, *self._shape), np.int16)

    def _see(self, layer: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen: dict[int, Tensor] | None = getattr(self._passes, "seen", None)
        if seen is not None:
            seen[layer] = inputs[1]

    @contextmanager
    def watching(self, plan: Plan) -> Iterator[None]:
        """A pass, in this thread, whose experts are kept."""
        seen: dict[int, Tensor] = {}
        self._passes.seen = seen
        try:
            yield
            chosen_TLK = torch.stack([seen[layer] for layer in self._layers], 1)[: plan.num_tokens]
            slots = plan.slots[: plan.num_tokens].cpu().numpy()
            self._table[slots[:, None], self._layers] = chosen_TLK.cpu().numpy()
        finally:
            self._passes.seen = None

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        """As of the cache."""
        pages = self._table.reshape(-1, PAGE_SIZE, *self._table.shape[1:])
        pages[targets] = pages[sources]

    def read(self, pages: list[int], start: int, end: int) -> np.ndarray:
        """int16 [end - start, L, K] of the tokens [start, end) of a request that holds `pages`."""
        places = np.arange(start, end)
        rows: np.ndarray = self._table[np.array(pages)[places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE]
        return rows
