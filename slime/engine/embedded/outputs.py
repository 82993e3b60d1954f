"""What a request answers: SGLang's fields of `/generate`."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np

from slime.engine.embedded.request import Request, TokenLogProb
from slime.engine.embedded.text import GrowingText, decode, held_back


class OutputBuilder:
    """Builds the answers of one request; `growing` is needed only where it is streamed."""

    def __init__(self, request: Request, tokenizer: Any, *, text_in_logprobs: bool = False) -> None:
        self.request = request
        self._tokenizer, self._text_in_logprobs = tokenizer, text_in_logprobs
        self._growing = GrowingText(tokenizer, skip_special_tokens=request.params.skip_special_tokens)

    def build(self, weight_version: str) -> dict[str, Any]:
        """The answer so far, cumulative; the whole once the request is finished. weight_version: the engine's now."""
        request = self.request
        finish_reason = request.finish_reason
        output_ids = request.output_ids
        if request.return_logprob:
            output_ids = output_ids[: len(request.output_logprobs)]
        text = self._whole_text(output_ids, finish_reason) if finish_reason else self._partial_text(output_ids)
        return {
            "text": text,
            "output_ids": output_ids,
            "meta_info": self._meta_info(finish_reason, len(output_ids), weight_version),
        }

    def _partial_text(self, output_ids: list[int]) -> str:
        text = self._growing.update(output_ids)
        count = held_back(text, self.request.params.stop)
        return text[: len(text) - count]

    def _whole_text(self, output_ids: list[int], finish_reason: dict[str, Any]) -> str:
        params, matched = self.request.params, finish_reason.get("matched")
        if isinstance(matched, int) and not params.no_stop_trim:
            output_ids = output_ids[:-1]
        text = decode(self._tokenizer, output_ids, skip_special_tokens=params.skip_special_tokens)
        if isinstance(matched, str) and (position := text.find(matched)) >= 0:
            return text[: position + len(matched)] if params.no_stop_trim else text[:position]
        return text

    def _meta_info(self, finish_reason: dict[str, Any] | None, num_output: int, weight_version: str) -> dict[str, Any]:
        request = self.request
        spans = [span for span in request.version_spans if span.start < num_output]
        meta_info: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": finish_reason,
            "prompt_tokens": request.prompt_length,
            "completion_tokens": num_output,
            "cached_tokens": request.cached_tokens or 0,
            "weight_version": spans[-1].version if spans else weight_version,
            "weight_versions": [
                {"version": span.version, "start": span.start, "end": min(span.end, num_output)} for span in spans
            ],
            "num_retractions": request.num_retractions,
        }
        if request.return_logprob:
            self._add_log_probs(meta_info, num_output)
        if finish_reason is not None:
            if request.return_routed_experts and request.routed_experts:
                meta_info["routed_experts"] = self._routed_experts(request.prompt_length + num_output - 1)
            now = time.perf_counter()
            meta_info["e2e_latency"] = (request.finished_at or now) - request.arrived
            if request.first_token_at is not None:
                meta_info["time_to_first_token"] = request.first_token_at - request.arrived
        return meta_info

    def _routed_experts(self, end: int) -> str:
        """Base64 of int32 [tokens, layers, experts of a token], of the tokens up to `end`."""
        rows = np.concatenate(self.request.routed_experts)[self.request.routed_experts_start_len : end]
        return base64.b64encode(rows.astype(np.int32).tobytes()).decode()

    def _add_log_probs(self, meta_info: dict[str, Any], num_output: int) -> None:
        request = self.request
        output = map(TokenLogProb, request.output_logprobs[:num_output], request.output_ids)
        meta_info["output_token_logprobs"] = [self._entry(item) for item in output]
        meta_info["input_token_logprobs"] = [self._entry(item) for item in request.input_logprobs]
        if request.top_logprobs_num:
            for name, rows in (
                ("output_top_logprobs", request.output_top_logprobs[:num_output]),
                ("input_top_logprobs", request.input_top_logprobs),
            ):
                meta_info[name] = [None if row is None else [self._entry(item) for item in row] for row in rows]

    def _entry(self, item: TokenLogProb) -> tuple[float | None, int, str | None]:
        text = self._tokenizer.decode([item.token]) if self._text_in_logprobs else None
        return item.log_prob, item.token, text
