"""Layers for multi-token prediction (MTP): a checkpoint holds them behind the model's own. Nothing here trains them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NO_NAMES = "(?!)"  # a pattern that nothing matches


def mtp_names(config: Mapping[str, Any]) -> re.Pattern[str]:
    """Matches, in full, the names of their tensors in a Hugging Face checkpoint. config: of its config.json."""
    fields = config.get("text_config") or config
    first, number = fields.get("num_hidden_layers"), fields.get("num_nextn_predict_layers")
    if not first or not number:
        return re.compile(NO_NAMES)
    layers = "|".join(str(first + extra) for extra in range(number))
    return re.compile(rf"model\.layers\.(?:{layers})\..+")
