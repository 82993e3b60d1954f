"""A few samples of each rollout, kept for the report: `samples/rollout_000012.jsonl`, the best, the worst, some others.

A line: `{"rollout_id", "index", "group_index", "pick", "prompt", "tokens", "loss_mask", "rollout_log_probs",
"omitted", "reward", "label", "status", "failure", "weight_versions"}`. `tokens` are the response's
as strings, beside them one loss-mask entry each and one log-probability or none. A long response keeps its head and its
tail; `omitted` is `[position, count]` of what was left out between them.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slime.observability.jsonl import read_jsonl
from slime.utils.types import Sample

SAMPLES_FOLDER = "samples"
# Token ids -> the text of each, such as [tokenizer.decode([i]) for i in ids].
TokenTexts = Callable[[list[int]], list[str]]
_NUM_BEST, _NUM_WORST, _NUM_RANDOM = 3, 3, 2
_HEAD_TOKENS, _TAIL_TOKENS = 384, 128
_MAX_PROMPT_CHARS = 4000


class Pick(NamedTuple):
    """A chosen sample: `kind` is "best", "worst" or "random"."""

    kind: str
    sample: Sample
    reward: float


def write_samples(
    run_dir: Path,
    rollout_id: int,
    samples: Sequence[Sample],
    *,
    rewards: Sequence[float],
    token_texts: TokenTexts,
) -> Path:
    """Write at most 8 of `samples`, the choice depending on `rollout_id` and the rewards only; returns the file.

    rewards: one a sample, NaN where there is none. The file is there whole or not at all.
    """
    records = [_record(rollout_id, pick, token_texts) for pick in pick_samples(samples, rewards, seed=rollout_id)]
    path = samples_path(run_dir, rollout_id)
    _write_whole(path, records)
    return path


def read_samples(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The kept samples by rollout id, ascending."""
    paths = sorted((run_dir / SAMPLES_FOLDER).glob("rollout_*.jsonl"))
    return {int(path.stem.removeprefix("rollout_")): read_jsonl(path) for path in paths}


def samples_path(run_dir: Path, rollout_id: int) -> Path:
    """The file of the samples of one rollout."""
    return run_dir / SAMPLES_FOLDER / f"rollout_{rollout_id:06d}.jsonl"


def pick_samples(samples: Sequence[Sample], rewards: Sequence[float], *, seed: int) -> list[Pick]:
    """The best, the worst and some other samples, equal rewards in random order; no sample twice."""
    order = list(zip(samples, rewards, strict=True))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda entry: math.inf if math.isnan(entry[1]) else -entry[1])  # stable; without a reward: last
    best = order[:_NUM_BEST]
    rest = order[_NUM_BEST:]
    worst = rest[-_NUM_WORST:][::-1]
    others = rest[: -len(worst)] if worst else []
    chosen = random.Random(seed).sample(others, min(_NUM_RANDOM, len(others)))
    kinds = ("best", best), ("worst", worst), ("random", chosen)
    return [Pick(kind, sample, reward) for kind, entries in kinds for sample, reward in entries]


def _record(rollout_id: int, pick: Pick, token_texts: TokenTexts) -> dict[str, Any]:
    sample = pick.sample
    num_prompt_tokens = len(sample.tokens) - sample.response_length
    prompt_tokens, response_tokens = sample.tokens[:num_prompt_tokens], sample.tokens[num_prompt_tokens:]
    prompt = "".join(token_texts(prompt_tokens)) if prompt_tokens else _prompt_text(sample.prompt)
    mask = [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
    num_omitted = max(0, sample.response_length - _HEAD_TOKENS - _TAIL_TOKENS)
    return {
        "rollout_id": rollout_id,
        "index": sample.index,
        "group_index": sample.group_index,
        "pick": pick.kind,
        "prompt": prompt[-_MAX_PROMPT_CHARS:],
        "tokens": token_texts(_abridged(response_tokens)),
        "loss_mask": _abridged([0] * len(mask) if sample.remove_sample else mask),
        "rollout_log_probs": None
        if sample.rollout_log_probs is None
        else _abridged(_rounded(sample.rollout_log_probs)),
        "omitted": [_HEAD_TOKENS, num_omitted] if num_omitted else None,
        "reward": None if math.isnan(pick.reward) else pick.reward,
        "label": sample.label,
        "status": sample.status.value,
        "failure": str(sample.metadata["failure"]) if "failure" in sample.metadata else None,
        "weight_versions": sorted(set(sample.weight_versions)),
    }


def _prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def _abridged(values: list[Any]) -> list[Any]:
    if len(values) <= _HEAD_TOKENS + _TAIL_TOKENS:
        return list(values)
    return [*values[:_HEAD_TOKENS], *values[-_TAIL_TOKENS:]]


def _rounded(log_probs: Sequence[float]) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in log_probs]


def _write_whole(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)
