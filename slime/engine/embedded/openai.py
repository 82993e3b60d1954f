"""OpenAI's completions and chat completions, on the same engine; with SGLang's extra sampling parameters."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse

from slime.engine.embedded.generation import (
    GenerationFailed,
    Generator,
    Handler,
    Progress,
    error_body,
    event,
    json_response,
)
from slime.engine.embedded.protocol import BadRequest, Generation, parse_json
from slime.engine.embedded.sampling_params import SamplingParams, parse_sampling_params

Kind = Literal["completion", "chat"]

SAME_NAME = (
    "temperature", "top_p", "n", "stop", "top_k", "min_p", "ignore_eos", "stop_token_ids", "skip_special_tokens",
    "no_stop_trim", "frequency_penalty", "presence_penalty", "repetition_penalty", "regex",
    "json_schema", "ebnf", "logit_bias",
)  # fmt: skip
RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}


class _Call(NamedTuple):
    """A parsed body: what to generate, and how to answer. num_top: of likeliest tokens, None without log-probs."""

    kind: Kind
    generation: Generation
    num_top: int | None
    include_usage: bool


class OpenAI:
    """The handlers of `/v1/*`."""

    def __init__(self, generator: Generator, *, model_name: str) -> None:
        self._generator, self._model_name = generator, model_name
        self._started = int(time.time())

    def reads(self) -> dict[str, Handler]:
        """Handlers of GET, under their paths."""
        return {"/v1/models": self.models}

    def writes(self) -> dict[str, Handler]:
        """Handlers of POST, under their paths."""
        return {"/v1/completions": self.completions, "/v1/chat/completions": self.chat_completions}

    async def models(self, _: HTTPRequest) -> Response:
        """The one model."""
        context = self._generator.engine.runner.context_length
        card = {"id": self._model_name, "object": "model", "created": self._started, "owned_by": "slime"}
        return json_response({"object": "list", "data": [card | {"root": self._model_name, "max_model_len": context}]})

    async def completions(self, http: HTTPRequest) -> Response:
        """Continues a prompt, or each of a list: text or tokens."""
        body = parse_json(await http.body())
        prompt = body.get("prompt")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise BadRequest("prompt must be a text, a list of token ids, or a list of either.")
        encode = self._generator.parser.encode
        prompts = [encode(item) if isinstance(item, str) else item for item in prompt]
        num_top = body.get("logprobs")
        return await self._answer(http, body, "completion", prompts, None if num_top is None else int(num_top))

    async def chat_completions(self, http: HTTPRequest) -> Response:
        """Answers a conversation, put together by the tokenizer's chat template."""
        body = parse_json(await http.body())
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of at least one message.")
        try:
            tokens = self._generator.tokenizer.apply_chat_template(
                messages,
                tools=body.get("tools"),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **(body.get("chat_template_kwargs") or {}),
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise BadRequest(f"the chat template cannot be applied: {error}.") from error
        num_top = int(body.get("top_logprobs") or 0) if body.get("logprobs") else None
        return await self._answer(http, body, "chat", [tokens], num_top)

    async def _answer(
        self, http: HTTPRequest, body: dict[str, Any], kind: Kind, prompts: list[list[int]], num_top: int | None
    ) -> Response:
        progress = Progress()
        stream = bool(body.get("stream"))
        identity = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        requests = []
        for index, tokens in enumerate(prompts):
            requests += self._generator.parser.make_requests(
                tokens,
                self._sampling_params(body, len(tokens)),
                f"{body.get('rid') or identity}-{index}",
                progress.notice,
                return_logprob=num_top is not None,
                top_logprobs_num=num_top or 0,
                stream=stream,
            )
        generation = Generation(requests, is_list=True, stream=stream, text_in_logprobs=True)
        include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        call = _Call(kind, generation, num_top, include_usage)
        if stream:
            self._generator.submit(generation)
            return StreamingResponse(self._events(call, progress, identity), media_type="text/event-stream")
        answers = await self._generator.run(generation, progress, http)
        choices = [_choice(call, index, answer, answer["text"]) for index, answer in enumerate(answers)]
        whole = {
            "choices": choices,
            "usage": _usage(answers),
            "metadata": {"weight_version": self._generator.weight_version},
        }
        return json_response(self._head(call, identity, "") | whole)

    def _sampling_params(self, body: dict[str, Any], prompt_length: int) -> SamplingParams:
        values = {name: body[name] for name in SAME_NAME if name in body}
        values |= {ours: body[theirs] for theirs, ours in RENAMED.items() if body.get(theirs) is not None}
        if "max_new_tokens" not in values:
            limits = self._generator.parser.limits
            values["max_new_tokens"] = max(1, min(limits.context_length, limits.cache_tokens) - prompt_length)
        try:
            return parse_sampling_params(values)
        except ValueError as error:
            raise BadRequest(str(error)) from error

    def _head(self, call: _Call, identity: str, suffix: str) -> dict[str, Any]:
        name = "chat.completion" + suffix if call.kind == "chat" else "text_completion"
        return {"id": identity, "object": name, "created": int(time.time()), "model": self._model_name}

    async def _events(self, call: _Call, progress: Progress, identity: str) -> AsyncIterator[bytes]:
        head = self._head(call, identity, ".chunk")
        sent = [""] * len(call.generation.requests)
        answers: dict[int, dict[str, Any]] = {}
        try:
            if call.kind == "chat":
                for index in range(len(sent)):
                    delta = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield event(head | {"choices": [delta]})
            async for index, answer in self._generator.stream(call.generation, progress):
                text = answer["text"]
                is_end = answer["meta_info"]["finish_reason"] is not None
                if len(text) > len(sent[index]) or is_end:
                    previous = answers.get(index, {"output_ids": []})
                    choice = _choice(call, index, answer, text[len(sent[index]) :], skip=len(previous["output_ids"]))
                    sent[index], answers[index] = text, answer
                    yield event(head | {"choices": [choice]})
            if call.include_usage:
                yield event(head | {"choices": [], "usage": _usage(list(answers.values()))})
        except GenerationFailed as error:
            yield event(error_body(str(error)))
        yield b"data: [DONE]\n\n"


def _choice(call: _Call, index: int, answer: dict[str, Any], text: str, *, skip: int = 0) -> dict[str, Any]:
    """One choice with `text`; of the log-probabilities those after the first `skip`."""
    reason = answer["meta_info"]["finish_reason"] or {}
    choice: dict[str, Any] = {
        "index": index,
        "logprobs": None if call.num_top is None else _log_probs(call, answer["meta_info"], skip),
        "finish_reason": reason.get("type"),
        "matched_stop": reason.get("matched"),
    }
    if call.kind == "completion":
        return choice | {"text": text}
    if call.generation.stream:
        return choice | {"delta": {"content": text}}
    return choice | {"message": {"role": "assistant", "content": text}}


def _log_probs(call: _Call, meta_info: dict[str, Any], skip: int) -> dict[str, Any]:
    entries = meta_info["output_token_logprobs"][skip:]
    tops = meta_info.get("output_top_logprobs", [])[skip:] if call.num_top else [[] for _ in entries]
    if call.kind == "completion":
        return {
            "tokens": [text for _, _, text in entries],
            "token_logprobs": [log_prob for log_prob, _, _ in entries],
            "top_logprobs": [{text: log_prob for log_prob, _, text in top} for top in tops] if call.num_top else None,
            "text_offset": [],
        }
    return {
        "content": [
            _token(*entry) | {"top_logprobs": [_token(*item) for item in top]}
            for entry, top in zip(entries, tops, strict=True)
        ]
    }


def _token(log_prob: float, _: int, text: str) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}


def _usage(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Token counts; a prompt that several samples continue counts once."""
    infos = [answer["meta_info"] for answer in answers]
    prompts = {info["id"].rpartition("-")[2].partition("_")[0]: info["prompt_tokens"] for info in infos}
    prompt, completion = sum(prompts.values()), sum(info["completion_tokens"] for info in infos)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
