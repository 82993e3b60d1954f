"""The public record of one rollout: `Sample`.

A worked example, one tool call inside a response (P prompt tokens, T response tokens):

    tokens            = [p0 p1 p2 | a0 a1 | t0 t1 t2 | a2 a3]        len P + T = 3 + 7
    response_length   =             7                                T
    loss_mask         =            [1  1    0  0  0    1  1]         len T: only sampled tokens are trained on
    rollout_log_probs =            [.  .    0  0  0    .  .]         len T: 0.0 where the engine sampled nothing
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from slime.utils.arrays import from_json, to_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Message = dict[str, Any]


class SampleStatus(StrEnum):
    """How a rollout ended. FAILED: generation or reward raised; `metadata["failure"]` says why."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


_STATUS_OF_FINISH_REASON = {
    "stop": SampleStatus.COMPLETED,
    "length": SampleStatus.TRUNCATED,
    "abort": SampleStatus.ABORTED,
}


@dataclass
class SpecInfo:
    """Speculative-decoding counters summed over the requests of one sample."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    def add(self, meta_info: dict[str, Any]) -> None:
        """Count what an engine reported of one request."""
        self.spec_accept_token_num += meta_info.get("spec_accept_token_num", 0)
        self.spec_draft_token_num += meta_info.get("spec_draft_token_num", 0)
        self.spec_verify_ct += meta_info.get("spec_verify_ct", 0)
        self.completion_token_num += meta_info.get("completion_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        """All counters by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, int]) -> SpecInfo:
        """The inverse of `to_dict`."""
        return cls(**state)


@dataclass
class PrefixCacheInfo:
    """Prompt tokens that the engine found in its cache, and all it was sent, over the requests of one sample."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    def add(self, meta_info: dict[str, Any]) -> None:
        """Count what an engine reported of one request."""
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        """All counters by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, int]) -> PrefixCacheInfo:
        """The inverse of `to_dict`."""
        return cls(**state)


@dataclass
class Sample:
    """One prompt with one response, its reward and everything that training needs to know of it.

    `tokens` is prompt + response; `loss_mask` and `rollout_log_probs` cover the response only and have
    `response_length` entries. `loss_mask=None` means all ones; `remove_sample=True` means all zeros.
    `rollout_routed_experts` [tokens - 1, layers, experts of a token]: where the engine that sampled sent each token,
    but the last, which it did not compute; shorter where tokens were told after the last that was sampled.
    """

    group_index: int | None = None  # samples of one prompt share it; rewards are normalised within it
    index: int | None = None  # unique in a run
    rollout_id: int | None = None  # siblings that one generate call fanned out share it
    prompt: str | list[Message] = ""
    tokens: list[int] = field(default_factory=list)
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    multimodal_train_input_id: str | None = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    rollout_top_p_token_ids: Any | None = None
    rollout_top_p_token_offsets: Any | None = None
    rollout_routed_experts: NDArray[np.integer[Any]] | None = field(default=None, compare=False)
    remove_sample: bool = False
    teacher_log_probs: list[float] | None = None
    status: SampleStatus = SampleStatus.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0  # seconds spent in tools and environments
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)
    turns: list[dict[str, Any]] = field(default_factory=list)  # of an interrupted conversation: slime.rollout.turns

    Status = SampleStatus  # no annotation: `Sample.Status.COMPLETED`, not a field

    @property
    def truncated(self) -> bool:
        """Whether the response was ended for its length. Generation functions may set it: `status` follows."""
        return self.status is SampleStatus.TRUNCATED

    @truncated.setter
    def truncated(self, value: bool) -> None:
        self._set_ended(SampleStatus.TRUNCATED, value)

    @property
    def aborted(self) -> bool:
        """Whether the engine was told to end the response. Generation functions may set it: `status` follows."""
        return self.status is SampleStatus.ABORTED

    @aborted.setter
    def aborted(self, value: bool) -> None:
        self._set_ended(SampleStatus.ABORTED, value)

    def _set_ended(self, status: SampleStatus, is_so: bool) -> None:
        """`status` is how the response ended, or is not: then COMPLETED, unless it is known to have ended otherwise."""
        if is_so:
            self.status = status
        elif self.status in (SampleStatus.PENDING, status):
            self.status = SampleStatus.COMPLETED

    @property
    def effective_response_length(self) -> int:
        """Response tokens that are trained on."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    @property
    def oldest_weight_version(self) -> int | None:
        """The first of the versions that sampled the response; None where none is a number (an engine before its
        first update)."""
        return min((int(version) for version in self.weight_versions if version.isdecimal()), default=None)

    def get_reward_value(self, args: Any, *, evaluation: bool = False) -> float:
        """The scalar reward: `reward`, or its entry `args.reward_key` (`args.eval_reward_key`) where it is a dict.

        Raises ValueError, naming the sample, where there is no such number.
        """
        value: Any = self.reward
        if isinstance(value, dict):
            key = args.eval_reward_key if evaluation else args.reward_key
            flag = "--eval-reward-key" if evaluation else "--reward-key"
            if key is None:
                raise ValueError(
                    f"the reward of sample {self.index} is a dict with keys {sorted(value)}. "
                    f"Name the one to {'report' if evaluation else 'train on'} with {flag}."
                )
            if key not in value:
                raise ValueError(f"{flag} {key!r} is not among the reward's keys {sorted(value)}")
            value = value[key]
        if value is None:
            raise ValueError(f"sample {self.index} has no reward (status {self.status.value})")
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # the last: a tensor of several entries
            raise ValueError(f"the reward of sample {self.index} is {value!r:.80}, not a number") from error

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: list[int],
        log_probs: list[float] | None = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
        routed_experts: NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """Extend the response by `tokens`, with mask, log-probs and text kept in step.

        trainable: whether the policy sampled these tokens (False for tool or environment output).
        log_probs: one per token, as the engine reported them; 0.0 for tokens that were not sampled.
        meta_info: the engine's `meta_info` of the call that produced them; its finish reason sets `status`
            unless `update_terminal_info` is False.
        routed_experts: [new, layers, experts of a token], of the tokens that had none, all but the last of `tokens`.
        Raises ValueError where lengths disagree.
        """
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens but {len(log_probs)} log-probs")
        had_log_probs = self.rollout_log_probs is not None or self.response_length == 0
        if log_probs is not None or not trainable:
            if had_log_probs:
                self.rollout_log_probs = (self.rollout_log_probs or []) + (log_probs or [0.0] * len(tokens))
        elif self.rollout_log_probs is not None:
            raise ValueError("earlier turns carry log-probs, these sampled tokens do not")
        if self.loss_mask is not None or not trainable:
            self.loss_mask = (self.loss_mask or [1] * self.response_length) + [int(trainable)] * len(tokens)
        self.tokens = self.tokens + tokens
        if routed_experts is not None:
            self._add_experts(routed_experts)
        self.response_length += len(tokens)
        self.response += text or ""
        if meta_info is not None:
            self._record(meta_info, terminal=update_terminal_info)

    def _add_experts(self, routed_experts: NDArray[np.integer[Any]]) -> None:
        import numpy as np

        known = self.rollout_routed_experts
        both = routed_experts if known is None else np.concatenate([known, routed_experts])
        if len(both) != len(self.tokens) - 1:
            raise ValueError(f"experts of {len(both)} tokens, there must be {len(self.tokens) - 1}")
        self.rollout_routed_experts = both

    def update_from_meta_info(self, args: Any, meta_info: dict[str, Any]) -> None:
        """Take weight version, counters and status from an engine's reply."""
        self._record(meta_info, terminal=True)

    def _record(self, meta_info: dict[str, Any], *, terminal: bool) -> None:
        spans = meta_info.get("weight_versions") or []  # of an engine that tells of updates within the response
        versions = [span["version"] for span in spans] or [meta_info.get("weight_version")]
        self.weight_versions += [str(version) for version in versions if version is not None]
        self.prefix_cache_info.add(meta_info)
        self.spec_info.add(meta_info)
        finish_reason = meta_info.get("finish_reason")
        if terminal and finish_reason is not None:
            reason = finish_reason["type"]
            self.status = _STATUS_OF_FINISH_REASON.get(reason, SampleStatus.FAILED)
            if self.status is SampleStatus.FAILED:
                self.metadata["failure"] = f"the engine ended the response with finish reason {reason!r}"

    def check(self) -> None:
        """Raise ValueError, naming the sample, where lengths contradict the contract."""
        if self.response_length > len(self.tokens):
            raise ValueError(
                f"sample {self.index}: response_length {self.response_length} exceeds its {len(self.tokens)} tokens"
            )
        experts = self.rollout_routed_experts
        if experts is not None and (experts.ndim != 3 or len(experts) >= max(1, len(self.tokens))):
            raise ValueError(
                f"sample {self.index}: rollout_routed_experts has shape {experts.shape}, it must be [at most "
                f"{len(self.tokens) - 1}, layers, experts of a token]"
            )
        for name in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
            values = getattr(self, name)
            if values is not None and len(values) != self.response_length:
                raise ValueError(
                    f"sample {self.index}: {name} has {len(values)} entries, "
                    f"the response has {self.response_length} tokens"
                )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-friendly dict; attributes that plug-ins added are kept."""
        state = dict(self.__dict__)
        state["status"] = self.status.value
        state["spec_info"] = self.spec_info.to_dict()
        state["prefix_cache_info"] = self.prefix_cache_info.to_dict()
        state["rollout_routed_experts"] = to_json(self.rollout_routed_experts)
        state["turns"] = [turn | {"routed_experts": to_json(turn.get("routed_experts"))} for turn in self.turns]
        return state

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`; unknown keys become attributes."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in state.items() if key in known}
        if "status" in values:
            values["status"] = SampleStatus(values["status"])
        if isinstance(values.get("spec_info"), dict):
            values["spec_info"] = SpecInfo.from_dict(values["spec_info"])
        if isinstance(values.get("prefix_cache_info"), dict):
            values["prefix_cache_info"] = PrefixCacheInfo.from_dict(values["prefix_cache_info"])
        values["rollout_routed_experts"] = from_json(values.get("rollout_routed_experts"))
        values["turns"] = [
            turn | {"routed_experts": from_json(turn.get("routed_experts"))} for turn in values.get("turns", [])
        ]
        sample = cls(**values)
        for key, value in state.items():
            if key not in known:
                setattr(sample, key, value)
        return sample


@dataclass(frozen=True)
class ParamInfo:
    """Name, shape and dtype of one parameter under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
