"""What one rollout hands to training: `TrainBatch`, flat arrays that travel through shared memory without a copy.

A worked example, two samples with 2 + 3 and 1 + 2 tokens of prompt + response:

    tokens            = [p p a a a | q b b]      sum of total_lengths = 8
    total_lengths     = [5, 3]
    response_lengths  = [3, 2]
    loss_mask         = [1 1 1 | 1 1]            sum of response_lengths = 5
    rewards           = [1.0, 0.0]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime.utils.types import Sample

Array = NDArray[Any]


def _per_sample() -> Any:
    return field(metadata={"axis": "sample"})


def _per_token(**kw: Any) -> Any:
    return field(metadata={"axis": "token"}, **kw)


def _per_response_token(**kw: Any) -> Any:
    return field(metadata={"axis": "response"}, **kw)


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """The samples of one rollout (S of them) as flat arrays. A new field is one line; `select` follows its axis."""

    tokens: Array = _per_token()  # int32, prompt + response of all samples
    total_lengths: Array = _per_sample()  # int32 [S]
    response_lengths: Array = _per_sample()  # int32 [S]
    loss_mask: Array = _per_response_token()  # float32: 1 where a token is trained on
    rollout_log_probs: Array | None = _per_response_token(default=None)  # float32, as the engine reported them
    teacher_log_probs: Array | None = _per_response_token(default=None)  # float32, as a teacher's engine reported them
    values: Array | None = _per_response_token(default=None)  # float32, the critic's
    kl: Array | None = _per_response_token(default=None)  # float32, KL(policy || reference), for the critic
    routed_experts: Array | None = _per_token(default=None)  # int16 [tokens, layers, K], the engine's; -1: not known
    rewards: Array = _per_sample()  # float32 [S]
    group_ids: Array = _per_sample()  # int64 [S], the samples of one prompt share one
    rollout_ids: Array = _per_sample()  # int64 [S], siblings that one generate call fanned out share one
    sample_indices: Array = _per_sample()  # int64 [S], `Sample.index`
    rewards_are_final: bool = False  # a plug-in normalised them: training takes them as advantages

    def __len__(self) -> int:
        return len(self.total_lengths)

    def select(self, rows: Sequence[int] | Array) -> TrainBatch:
        """The samples `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        positions = {
            "sample": rows,
            "token": _positions(self.total_lengths, rows),
            "response": _positions(self.response_lengths, rows),
        }
        changes = {
            item.name: getattr(self, item.name)[positions[item.metadata["axis"]]]
            for item in dataclasses.fields(self)
            if "axis" in item.metadata and getattr(self, item.name) is not None
        }
        return dataclasses.replace(self, **changes)


def _positions(lengths: Array, rows: Array) -> Array:
    """Where the entries of `rows` stand in an array that lays `lengths` entries a row end to end."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if len(rows) == 0:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([np.arange(starts[row], starts[row] + lengths[row]) for row in rows])


def batch_from_samples(
    samples: Sequence[Sample], rewards: Sequence[float], *, rewards_are_final: bool = False
) -> TrainBatch:
    """Lay samples end to end. Raises ValueError, naming the sample, where its lengths contradict each other or its
    reward is not finite.

    rewards: one number a sample. Log-probs of engine and teacher are kept where every sample has them, experts where
    every sample that is trained on has them.
    """
    if not samples:
        raise ValueError("the rollout returned no samples to train on")
    if len(rewards) != len(samples):
        raise ValueError(f"{len(samples)} samples but {len(rewards)} rewards")
    for sample in samples:
        sample.check()
        if not 0 < sample.response_length < len(sample.tokens):
            raise ValueError(
                f"sample {sample.index} ({sample.status.value}) has {len(sample.tokens)} tokens, of which "
                f"{sample.response_length} response; training needs at least one of prompt and one of response"
            )
    rewards_S = _finite_rewards(samples, rewards, are_final=rewards_are_final)
    return TrainBatch(
        tokens=_flat((sample.tokens for sample in samples), np.int32),
        total_lengths=np.array([len(sample.tokens) for sample in samples], dtype=np.int32),
        response_lengths=np.array([sample.response_length for sample in samples], dtype=np.int32),
        loss_mask=_flat((_mask(sample) for sample in samples), np.float32),
        rollout_log_probs=_where_all([sample.rollout_log_probs for sample in samples]),
        teacher_log_probs=_where_all([sample.teacher_log_probs for sample in samples]),
        routed_experts=_routed_experts(samples),
        rewards=rewards_S,
        group_ids=np.array([_group_id(sample) for sample in samples], dtype=np.int64),
        rollout_ids=_rollout_ids(samples),
        sample_indices=np.array([-1 if s.index is None else s.index for s in samples], dtype=np.int64),
        rewards_are_final=rewards_are_final,
    )


def _finite_rewards(samples: Sequence[Sample], rewards: Sequence[float], *, are_final: bool) -> Array:
    """`rewards` in float32, [S]. Raises ValueError at the first that is not finite there."""
    with np.errstate(over="ignore"):
        rewards_S: Array = np.array(rewards, dtype=np.float32)
    (bad,) = np.nonzero(~np.isfinite(rewards_S))
    if len(bad):
        sample, reward = samples[bad[0]], rewards[bad[0]]
        source = "--custom-reward-post-process-path returned" if are_final else "its reward function or generation set"
        raise ValueError(f"sample {sample.index}: the reward that {source} is {reward}; it must be finite in float32")
    return rewards_S


def _where_all(values: list[list[float] | None]) -> Array | None:
    """One value a response token, where every sample has them."""
    given = [entry for entry in values if entry is not None]
    return _flat(given, np.float32) if len(given) == len(values) else None


def _routed_experts(samples: Sequence[Sample]) -> Array | None:
    """[tokens, layers, K], -1 where a sample has none; None where some token that is trained on has none."""
    given = [sample.rollout_routed_experts for sample in samples if sample.rollout_routed_experts is not None]
    if not given or any(_num_routed(sample) < _num_to_route(sample) for sample in samples):
        return None
    sizes = {experts.shape[1:] for experts in given}
    if len(sizes) > 1:
        raise ValueError(f"samples have rollout_routed_experts of several shapes: {sorted(sizes)}")
    table = np.full((sum(len(sample.tokens) for sample in samples), *sizes.pop()), -1, dtype=np.int16)
    start = 0
    for sample in samples:
        if sample.rollout_routed_experts is not None:
            table[start : start + len(sample.rollout_routed_experts)] = sample.rollout_routed_experts
        start += len(sample.tokens)
    return table


def _num_routed(sample: Sample) -> int:
    return 0 if sample.rollout_routed_experts is None else len(sample.rollout_routed_experts)


def _num_to_route(sample: Sample) -> int:
    """Tokens from the start whose experts decide on a token that is trained on: those before the last such token."""
    (trained,) = np.nonzero(np.asarray(_mask(sample)))
    return len(sample.tokens) - sample.response_length + int(trained[-1]) if len(trained) else 0


def _rollout_ids(samples: Sequence[Sample]) -> Array:
    """[S] where a sample names none, one of its own."""
    own = [-1 - (place if sample.index is None else sample.index) for place, sample in enumerate(samples)]
    ids = [mine if sample.rollout_id is None else sample.rollout_id for mine, sample in zip(own, samples, strict=True)]
    return np.array(ids, dtype=np.int64)


def _mask(sample: Sample) -> list[int]:
    if sample.remove_sample:
        return [0] * sample.response_length
    return sample.loss_mask if sample.loss_mask is not None else [1] * sample.response_length


def _group_id(sample: Sample) -> int:
    if sample.group_index is None:
        raise ValueError(f"sample {sample.index} has no group_index; samples of one prompt must share one")
    return sample.group_index


def _flat(parts: Iterable[Sequence[float]], dtype: type) -> Array:
    return np.fromiter((value for part in parts for value in part), dtype=dtype)
