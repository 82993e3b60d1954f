"""The body of `/generate`, checked and cut into single requests."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from slime.engine.embedded.request import Request
from slime.engine.embedded.sampling import derive_seed
from slime.engine.embedded.sampling_params import SamplingParams, parse_sampling_params

KNOWN_FIELDS = {
    "text", "input_ids", "sampling_params", "rid", "return_logprob", "logprob_start_len", "top_logprobs_num",
    "return_text_in_logprobs", "stream", "return_routed_experts", "routed_experts_start_len",
}  # fmt: skip
"""Fields with a meaning here."""

IGNORED_FIELDS = {
    "log_metrics", "no_logs", "priority", "bootstrap_host", "bootstrap_port", "bootstrap_room", "extra_key",
    "session_params", "modalities", "lora_path", "conversation_id", "routing_key", "custom_labels",
    "return_bytes", "background",
}  # fmt: skip
"""Fields of SGLang's that change no token; a router adds some of them."""

ABSENT_FIELDS = {
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "custom_logit_processor",
    "token_ids_logprob",
}
"""Fields of SGLang's that would change the answer, and are not supported."""


class BadRequest(ValueError):
    """What the client sent cannot be served; the message is one sentence for it."""


@dataclass(frozen=True)
class Limits:
    """What a request may be. `tokenizer` is None-safe nowhere: every engine has one."""

    context_length: int
    cache_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    returns_experts: bool = False


@dataclass(slots=True)
class Generation:
    """A checked body: its requests in order of the answers, and whether the answer is a list."""

    requests: list[Request]
    is_list: bool
    stream: bool
    text_in_logprobs: bool


class RequestParser:
    """Makes requests of JSON bodies."""

    def __init__(self, tokenizer: Any, limits: Limits, *, random_seed: int) -> None:
        self._tokenizer, self.limits = tokenizer, limits
        self._random_seed = random_seed
        self._num_seeds = itertools.count()

    def parse(self, body: dict[str, Any], listener: Callable[[Request], None]) -> Generation:
        """The generation that a body of `/generate` asks for. Raises BadRequest with one sentence."""
        self._check_fields(body)
        prompts, is_list = self._prompts(body)
        params = _per_prompt(body, "sampling_params", None, len(prompts))
        try:
            parsed = [parse_sampling_params(item) for item in params]
        except ValueError as error:
            raise BadRequest(str(error)) from error
        options = [_per_prompt(body, name, default, len(prompts)) for name, default in _OPTIONS]
        rids = _rids(body.get("rid"), len(prompts), is_list)
        requests: list[Request] = []
        for index, (tokens, sampling) in enumerate(zip(prompts, parsed, strict=True)):
            chosen = [values[index] for values in options]
            requests += self.make_requests(
                tokens, sampling, rids[index], listener, *chosen, stream=bool(body.get("stream"))
            )
        is_list = is_list or len(requests) > 1
        return Generation(requests, is_list, bool(body.get("stream")), bool(body.get("return_text_in_logprobs")))

    def make_requests(
        self,
        tokens: list[int],
        params: SamplingParams,
        rid: str,
        listener: Callable[[Request], None],
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        return_routed_experts: bool = False,
        routed_experts_start_len: int = 0,
        *,
        stream: bool = False,
    ) -> list[Request]:
        """The `params.n` requests for one prompt. Raises BadRequest if it does not fit the engine."""
        self._check_prompt(tokens, params)
        start = len(tokens) if logprob_start_len < 0 or not return_logprob else logprob_start_len
        if start > len(tokens):
            raise BadRequest(f"logprob_start_len {start} is higher than the number of input tokens {len(tokens)}.")
        if return_routed_experts and not self.limits.returns_experts:
            raise BadRequest("return_routed_experts needs an engine started with --enable-return-routed-experts.")
        if not 0 <= routed_experts_start_len <= len(tokens):
            raise BadRequest(
                f"routed_experts_start_len must lie between 0 and the number of input tokens {len(tokens)}, got "
                f"{routed_experts_start_len}."
            )
        seed = params.sampling_seed if params.sampling_seed is not None else self._draw_seed()
        stop_tokens = params.stop_token_ids | self.limits.eos_token_ids
        return [
            Request(
                rid=rid if params.n == 1 else f"{rid}_{index}",
                tokens=list(tokens),
                prompt_length=len(tokens),
                params=params,
                seed=seed if index == 0 else derive_seed(seed, index),
                stop_tokens=stop_tokens,
                listener=listener,
                return_logprob=return_logprob,
                logprob_start_len=start,
                top_logprobs_num=min(top_logprobs_num, self.limits.vocab_size) if return_logprob else 0,
                return_routed_experts=return_routed_experts,
                routed_experts_start_len=routed_experts_start_len,
                stream=stream,
            )
            for index in range(params.n)
        ]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with the special tokens that the tokenizer adds."""
        tokens: list[int] = self._tokenizer.encode(text)
        return tokens

    def _draw_seed(self) -> int:
        return derive_seed(self._random_seed, next(self._num_seeds))

    @staticmethod
    def _check_fields(body: dict[str, Any]) -> None:
        for name, value in body.items():
            if name in KNOWN_FIELDS or name in IGNORED_FIELDS or value is None or value is False:
                continue
            if name in ABSENT_FIELDS or name.startswith("return_"):
                raise BadRequest(f"{name} is not supported by the embedded engine.")
            if name not in IGNORED_FIELDS:
                raise BadRequest(f"unknown field {name!r}.")

    def _prompts(self, body: dict[str, Any]) -> tuple[list[list[int]], bool]:
        text, input_ids = body.get("text"), body.get("input_ids")
        if (text is None) == (input_ids is None):
            raise BadRequest("Either text or input_ids should be provided, and not both.")
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, list) or not texts or not all(isinstance(item, str) for item in texts):
                raise BadRequest("text must be a string or a list of strings.")
            return [self.encode(item) for item in texts], isinstance(text, list)
        if not isinstance(input_ids, list) or not input_ids:
            raise BadRequest("input_ids must be a list of token ids or a list of such lists, and not empty.")
        is_list = isinstance(input_ids[0], list)
        return (input_ids if is_list else [input_ids]), is_list

    def _check_prompt(self, tokens: list[int], params: SamplingParams) -> None:
        limits, count = self.limits, len(tokens)
        if not isinstance(tokens, list) or count == 0:
            raise BadRequest("a prompt must have at least one token.")
        for token in tokens:
            if type(token) is not int or not 0 <= token < limits.vocab_size:
                raise BadRequest(f"input_ids must be integers in [0, {limits.vocab_size}), got {token!r}.")
        if count >= limits.context_length:
            raise BadRequest(
                f"The input ({count} tokens) is longer than the context length ({limits.context_length} tokens)."
            )
        total = count + params.max_new_tokens
        if total > limits.context_length:
            raise BadRequest(
                f"Requested token count exceeds the model's maximum context length of {limits.context_length} tokens. "
                f"You requested a total of {total} tokens: {count} tokens from the input messages and "
                f"{params.max_new_tokens} tokens for the completion."
            )
        if total > limits.cache_tokens:
            raise BadRequest(
                f"The request needs {total} tokens of key-value cache, the engine has {limits.cache_tokens} "
                "(--max-total-tokens, --mem-fraction-static)."
            )


_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("return_logprob", False),
    ("logprob_start_len", -1),
    ("top_logprobs_num", 0),
    ("return_routed_experts", False),
    ("routed_experts_start_len", 0),
)
_OPTION_TYPES = {name: type(default) for name, default in _OPTIONS}


def _per_prompt(body: dict[str, Any], name: str, default: Any, count: int) -> list[Any]:
    """A field that holds one value for all prompts or a list with one for each."""
    value = body.get(name, default)
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise BadRequest(f"{name} has {len(values)} items for {count} prompts.")
    values = [default if item is None else item for item in values]
    wanted = _OPTION_TYPES.get(name)
    for item in values:
        if wanted is not None and type(item) is not wanted:
            raise BadRequest(f"{name} must be {wanted.__name__}, got {item!r}.")
    return values


def _rids(rid: Any, count: int, is_list: bool) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(rid, str):
        return [f"{rid}_{index}" for index in range(count)] if is_list else [rid]
    if isinstance(rid, list) and len(rid) == count and all(isinstance(item, str) for item in rid):
        return rid
    raise BadRequest(f"rid must be a string, or a list of {count} strings.")


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body; an empty body is an empty object. Raises BadRequest otherwise."""
    if not raw:
        return {}
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}.")
    return body
