"""Continuous batching: which requests run in the next pass, what memory they get, what becomes of drawn tokens.

A request is a list of tokens of which the first `num_computed` are in the cache. A step computes the missing ones: one
token of a decoding request, a chunk of a prompt, or everything anew after its memory was taken or the weights changed.
Whoever has no missing token left draws one. Requests run in order of arrival; if memory runs out, the youngest gives
its pages back and queues.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime.engine.embedded.kv_cache import PAGE_SIZE, OutOfPages
from slime.engine.embedded.logprobs import InputLogProbs
from slime.engine.embedded.model_runner import ModelRunner
from slime.engine.embedded.plan import Batch
from slime.engine.embedded.prefix_cache import PrefixCache, PrefixMatch, common_length
from slime.engine.embedded.request import Request, TokenLogProb
from slime.engine.embedded.sampling import Drawn, SamplingTable, sample

MAX_LOGITS = 1 << 26
"""Logits of one pass at most (256 MiB in float32): prompts whose log-probabilities are wanted go in chunks."""


@dataclass(slots=True)
class Counters:
    """What the scheduler did since its start."""

    num_finished: int = 0
    num_aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    num_retractions: int = 0
    num_steps: int = 0


@dataclass(slots=True)
class Work:
    """One request's share of a step: tokens [start, end) of it are computed."""

    request: Request
    start: int
    end: int


class Scheduler:
    """The requests of one engine; `step` runs one forward pass."""

    def __init__(self, runner: ModelRunner, *, max_running: int, chunk_size: int, reuse_prefixes: bool) -> None:
        self.runner = runner
        self.weight_version = "default"
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.counters = Counters()
        self._cache = runner.cache
        self._prefixes = PrefixCache(runner.cache)
        self._reuse_prefixes = reuse_prefixes
        self._chunk_size = chunk_size
        self._max_logit_rows = max(16, MAX_LOGITS // runner.vocab_size)
        self._max_running = max_running
        self._free_rows = list(range(max_running))
        longest = min(runner.context_length, runner.cache.num_tokens)
        self._page_table = np.zeros((max_running, -(-longest // PAGE_SIZE) + 1), dtype=np.int64)
        self._copies: list[tuple[int, int]] = []
        self._table = SamplingTable(max_running)
        self._news: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running or self.waiting)

    @property
    def num_used_tokens(self) -> int:
        """Tokens of the cache's pages that requests or known prefixes hold."""
        return (self._cache.num_pages - 1 - self._cache.num_free_pages) * PAGE_SIZE

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of known prefixes."""
        return self._prefixes.num_tokens

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.waiting.append(request)

    def take_news(self) -> list[Request]:
        """The requests with new tokens to stream, or an end, since the last call."""
        news, self._news = self._news, []
        return news

    @torch.inference_mode()
    def step(self) -> None:
        """Admits what fits, computes one pass, draws tokens."""
        self._admit()
        self._copy_borders()
        work = self._plan_work()
        if not work:
            return
        self.counters.num_steps += 1
        prompts = InputLogProbs()
        draws: list[Work] = []
        logits = self._forward(work, draws, prompts)
        for item in work:
            item.request.num_computed = item.end
        prompts.finish(logits[: prompts.num_rows])
        if draws:
            self._draw([item.request for item in draws], logits[prompts.num_rows :])
        for item in work:
            self._remember_prompt(item)

    def abort(self, requests: list[Request], message: str) -> None:
        """Ends requests, waiting or running, with what they have."""
        chosen = set(map(id, requests))
        self.waiting = deque(request for request in self.waiting if id(request) not in chosen)
        for request in requests:
            if not request.is_finished:
                self.counters.num_aborted += 1
                self._finish(request, {"type": "abort", "message": message, "status_code": None, "err_type": None})
        self.running = [request for request in self.running if id(request) not in chosen]

    def fail_all(self, error: str) -> None:
        """Ends every request with an error."""
        for request in [*self.running, *self.waiting]:
            request.error = error
            self._end(request)
        self.running.clear()
        self.waiting.clear()

    def retract_all(self) -> None:
        """Sends all running requests back to the front of the queue, without their memory."""
        for request in reversed(self.running):
            self._retract(request)
        self.running.clear()

    def forget_cache(self) -> None:
        """Makes every key and value invalid: prefixes are forgotten, running requests queue to be computed anew."""
        self.retract_all()
        self._prefixes.clear()
        self._cache.clear()

    # admission

    def _admit(self) -> None:
        """Moves requests from the queue to the running ones while rows and memory last.

        A request most of whose prompt another one is about to compute waits for that one, and then finds it in the
        cache.
        """
        in_flight = {self._prompt_key(r): r for r in self.running if r.num_computed < r.prompt_length}
        budget = self._chunk_size - sum(len(r.tokens) - r.num_computed for r in self.running)
        deferred: list[Request] = []
        while self.waiting and self._free_rows and budget > 0:
            request = self.waiting.popleft()
            key = self._prompt_key(request)
            if self._reuse_prefixes and (other := in_flight.get(key)) is not None and self._should_wait(request, other):
                deferred.append(request)
                continue
            if not self._try_start(request):
                deferred.append(request)
                break
            in_flight.setdefault(key, request)
            budget -= len(request.tokens) - request.num_computed
        self.waiting.extendleft(reversed(deferred))

    @staticmethod
    def _prompt_key(request: Request) -> tuple[int, ...]:
        return tuple(request.tokens[: min(PAGE_SIZE, request.prompt_length - 1)])

    def _should_wait(self, request: Request, other: Request) -> bool:
        limit = self._match_limit(request)
        shared = common_length(other.tokens[: other.prompt_length], request.tokens[:limit])
        known = self._prefixes.match(request.tokens, limit).length
        return shared - known >= max(1, (len(request.tokens) - known) // 2)

    def _match_limit(self, request: Request) -> int:
        """How many leading tokens may come from the cache: never the last one, whose logits are needed."""
        limit = len(request.tokens) - 1
        if request.wants_input_logprobs:
            limit = min(limit, request.logprob_start_len + max(0, len(request.input_logprobs) - 1))
        return limit

    def _try_start(self, request: Request) -> bool:
        """Gives the request a row and pages for its tokens, shared where known; False if memory does not last."""
        length, pages = PrefixMatch(0, [])
        if self._reuse_prefixes:
            length, pages = self._prefixes.match(request.tokens, self._match_limit(request))
        self._cache.share(pages)
        wanted = -(-len(request.tokens) // PAGE_SIZE) - length // PAGE_SIZE
        one_page_more_each = len(self.running)
        if not self._make_room(wanted + one_page_more_each):
            self._cache.free(pages)
            return False
        own = self._cache.allocate(wanted)
        if length % PAGE_SIZE:
            self._copies.append((pages.pop(), own[0]))
        request.num_computed = length
        if request.cached_tokens is None:
            request.cached_tokens = length
            self.counters.cached_tokens += length
            self.counters.prompt_tokens += request.prompt_length
        request.row = self._free_rows.pop()
        self._table.set_row(request.row, request.params, request.seed)
        self._add_pages(request, pages + own)
        self.running.append(request)
        return True

    def _add_pages(self, request: Request, pages: list[int]) -> None:
        count = len(request.pages)
        self._page_table[request.row, count : count + len(pages)] = pages
        request.pages += pages

    def _copy_borders(self) -> None:
        """Copies the half-filled pages that admitted requests continue, all at once."""
        if self._copies:
            sources, targets = map(list, zip(*self._copies, strict=True))
            self._cache.copy_pages(sources, targets)
            if self.runner.routed is not None:
                self.runner.routed.copy_pages(sources, targets)
            self._cache.free(sources)
            self._copies.clear()

    def _make_room(self, num_pages: int) -> bool:
        if self._cache.num_free_pages < num_pages:
            self._prefixes.evict(num_pages)
        return self._cache.num_free_pages >= num_pages

    # a step's work

    def _plan_work(self) -> list[Work]:
        """Each running request's share of the next pass, with pages to write to; the youngest give way if need be."""
        budget, logit_rows = self._chunk_size, self._max_logit_rows
        work: list[Work] = []
        index = 0
        while index < len(self.running):
            request = self.running[index]
            missing = len(request.tokens) - request.num_computed
            count = missing if missing == 1 else min(missing, budget)
            if request.wants_input_logprobs and missing > 1:
                count = min(count, logit_rows)
                logit_rows -= count
            if count > 0 and self._ensure_pages(request, request.num_computed + count, index):
                work.append(Work(request, request.num_computed, request.num_computed + count))
                budget -= count if missing > 1 else 0
            index += 1
        return work

    def _ensure_pages(self, request: Request, length: int, index: int) -> bool:
        """Gives the request pages for `length` tokens, taken from prefixes, then the youngest; False if it gave way."""
        wanted = -(-length // PAGE_SIZE) - len(request.pages)
        while wanted > 0:
            if self._make_room(wanted):
                self._add_pages(request, self._cache.allocate(wanted))
                return True
            if len(self.running) == 1:
                raise OutOfPages(
                    f"request {request.rid} alone needs more than the {self._cache.num_tokens} tokens of the cache"
                )
            youngest = self.running.pop()
            self._retract(youngest)
            if youngest is request:
                return False
        return True

    def _retract(self, request: Request) -> None:
        self._release_pages(request)
        self._release_row(request)
        request.num_retractions += 1
        self.counters.num_retractions += 1
        self.waiting.appendleft(request)

    def _release_pages(self, request: Request) -> None:
        if request.return_routed_experts and self.runner.routed is not None and request.num_computed:
            rows = self.runner.routed.read(request.pages, request.num_routed, request.num_computed)
            request.routed_experts.append(rows)
        self._cache.free(request.pages)
        request.pages, request.num_computed = [], 0

    def _release_row(self, request: Request) -> None:
        if request.row >= 0:
            self._free_rows.append(request.row)
            request.row = -1

    def _forward(self, work: list[Work], draws: list[Work], prompts: InputLogProbs) -> Tensor:
        """Runs the pass. Its logits are first the rows that `prompts` asks for, then one row for each of `draws`."""
        work.sort(key=_pass_order)
        tokens: list[int] = []
        draw_rows: list[int] = []
        for item in work:
            request, first = item.request, len(tokens)
            if item.end - item.start == 1:
                tokens.append(request.tokens[item.start])
            else:
                tokens += request.tokens[item.start : item.end]
            if request.return_logprob:
                prompts.ask(request, item.start, item.end, first)
            if item.end == len(request.tokens):
                draws.append(item)
                draw_rows.append(len(tokens) - 1)
        fields = np.array([(item.request.row, item.start, item.end) for item in work])
        batch = Batch(tokens, fields[:, 0], fields[:, 1], fields[:, 2], self._page_table)
        return self.runner.forward(batch, prompts.rows + draw_rows)

    # after a pass

    def _draw(self, requests: list[Request], logits: Tensor) -> None:
        """Draws a token for each request from its row of logits, and ends those that are done."""
        fields = np.array([(request.row, len(request.tokens) - request.prompt_length) for request in requests])
        rows, counters = fields[:, 0], fields[:, 1]
        for place in np.flatnonzero(counters < self._table.min_new_tokens[rows]):
            if requests[place].stop_tokens:
                logits[place, list(requests[place].stop_tokens)] = float("-inf")
        num_top = max(request.top_logprobs_num for request in requests)
        drawn = sample(logits, self._table, rows, counters, num_top=num_top)
        for index, request in enumerate(requests):
            self._append(request, drawn, index)
        self.running = [request for request in self.running if not request.is_finished]

    def _append(self, request: Request, drawn: Drawn, index: int) -> None:
        if request.params.max_new_tokens == 0:
            self._finish(request, {"type": "length", "length": 0})
            return
        token, log_prob = drawn.tokens[index], drawn.log_probs[index]
        if log_prob != log_prob:
            request.error = f"the model's logits are not finite under weights {self.weight_version!r}"
            self._end(request)
            return
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        request.tokens.append(token)
        request.record_version(self.weight_version)
        self.counters.generated_tokens += 1
        if request.return_logprob:
            request.output_logprobs.append(log_prob)
            if request.top_logprobs_num:
                request.output_top_logprobs.append(top_entries(drawn, index, request.top_logprobs_num))
        reason = self._reason_to_finish(request, token)
        if reason is not None:
            self._finish(request, reason)
        elif request.stream:
            self._news.append(request)

    @staticmethod
    def _reason_to_finish(request: Request, token: int) -> dict[str, Any] | None:
        if request.stop_checker is not None and (matched := request.stop_checker.check(request.output_ids)) is not None:
            return {"type": "stop", "matched": matched}
        if token in request.stop_tokens and not request.params.ignore_eos:
            return {"type": "stop", "matched": token}
        if request.num_output >= request.params.max_new_tokens:
            return {"type": "length", "length": request.params.max_new_tokens}
        return None

    def _finish(self, request: Request, reason: dict[str, Any]) -> None:
        request.finish_reason = reason
        self._end(request)

    def _end(self, request: Request) -> None:
        """Takes a finished request's memory back, leaving what it computed to the prefix cache, and reports it."""
        request.finished_at = time.perf_counter()
        self.counters.num_finished += 1
        if request.error is None and self._reuse_prefixes and request.num_computed >= request.prompt_length:
            self._prefixes.insert(request.tokens[: request.num_computed], request.pages)
        self._release_pages(request)
        self._release_row(request)
        self._news.append(request)

    def _remember_prompt(self, item: Work) -> None:
        """Makes a prompt known as soon as it is computed, so that its other samples find it."""
        request = item.request
        if self._reuse_prefixes and item.start < request.prompt_length <= item.end and request.pages:
            self._prefixes.insert(request.tokens[: request.prompt_length], request.pages)


def _pass_order(item: Work) -> tuple[int, int]:
    """Single tokens first, by length: their attention blocks are then slices of the pass."""
    return int(item.end - item.start > 1), item.end


def top_entries(drawn: Drawn, index: int, count: int) -> list[TokenLogProb]:
    """The `count` most likely tokens of one drawn row, most likely first."""
    assert drawn.top_log_probs is not None
    assert drawn.top_tokens is not None
    values, tokens = drawn.top_log_probs[index, :count].tolist(), drawn.top_tokens[index, :count].tolist()
    return [TokenLogProb(value, token) for value, token in zip(values, tokens, strict=True)]
