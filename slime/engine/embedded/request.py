"""One request from its arrival to its end: what was asked, what was computed, what was generated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from slime.engine.embedded.sampling_params import SamplingParams


class TokenLogProb(NamedTuple):
    """A token's log-probability; None where it has no predecessor to be predicted from."""

    log_prob: float | None
    token: int


class VersionSpan(NamedTuple):
    """Output tokens [start, end) were sampled under the weights `version`."""

    version: str
    start: int
    end: int


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and its continuation.

    listener: called in the server's event loop whenever there is news of a streamed request, and at the end of any.
    tokens: prompt and output in one list, of which the first `num_computed` are in the key-value cache, in `pages`.
    logprob_start_len: first prompt token whose log-probability is wanted; the prompt's length for none.
    routed_experts_start_len: first token whose experts are wanted, with return_routed_experts.
    seed: drawn with, together with the number of the output token, and nothing else.
    """

    rid: str
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    stop_tokens: frozenset[int]
    listener: Callable[[Request], None]
    return_logprob: bool = False
    logprob_start_len: int = 0
    top_logprobs_num: int = 0
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    stream: bool = False

    row: int = -1
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    num_retractions: int = 0
    output_logprobs: list[float] = field(default_factory=list)
    output_top_logprobs: list[list[TokenLogProb]] = field(default_factory=list)
    input_logprobs: list[TokenLogProb] = field(default_factory=list)
    input_top_logprobs: list[list[TokenLogProb] | None] = field(default_factory=list)
    routed_experts: list[np.ndarray] = field(default_factory=list)
    version_spans: list[VersionSpan] = field(default_factory=list)
    stop_checker: Any = None
    finish_reason: dict[str, Any] | None = None
    error: str | None = None
    arrived: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def num_routed(self) -> int:
        """Tokens whose experts are in `routed_experts`, each as when it was first computed."""
        return sum(map(len, self.routed_experts))

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def wants_input_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed."""
        return self.logprob_start_len + len(self.input_logprobs) < self.prompt_length

    def record_version(self, version: str) -> None:
        """Notes that the newest output token was sampled under `version`."""
        end = self.num_output
        if self.version_spans and self.version_spans[-1].version == version:
            self.version_spans[-1] = self.version_spans[-1]._replace(end=end)
        else:
            self.version_spans.append(VersionSpan(version, end - 1, end))
