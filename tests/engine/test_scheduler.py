"""Continuous batching: no request's answer depends on the others, to the bit, and memory never runs out."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from slime.engine.embedded.kv_cache import KVCache
from slime.engine.embedded.model_runner import ModelRunner
from slime.engine.embedded.request import Request
from slime.engine.embedded.sampling_params import SamplingParams
from slime.engine.embedded.scheduler import Scheduler

MAX_STEPS = 5000


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_request(number: int) -> Request:
    """Request `number`: pairs share their prompt; lengths, temperatures and what is asked for vary."""
    prompts, own = random.Random(number // 2), random.Random(number)
    length = prompts.choice([1, 2, 5, 15, 16, 17, 31, 33, 64, 100, 150])
    tokens = [prompts.randrange(4, 320) for _ in range(length)]
    params = SamplingParams(
        max_new_tokens=own.randrange(1, 40),
        temperature=own.choice([0.0, 0.7, 1.0]),
        top_p=own.choice([0.8, 1.0]),
        top_k=own.choice([-1, 20]),
    )
    return Request(
        rid=str(number),
        tokens=tokens,
        prompt_length=length,
        params=params,
        seed=number,
        stop_tokens=frozenset({2}),
        listener=lambda _: None,
        return_logprob=True,
        logprob_start_len=own.choice([length, 0, length // 2]),
        top_logprobs_num=own.choice([0, 2]),
    )


@dataclass
class Run:
    """How requests are served: what must not change their answers."""

    max_running: int = 64
    chunk_size: int = 4096
    reuse_prefixes: bool = True
    arrival_seed: int | None = None

    def serve(self, runner: ModelRunner, requests: list[Request]) -> Scheduler:
        """Runs all requests to their end; they arrive at once, or one by one at random times."""
        scheduler = Scheduler(
            runner, max_running=self.max_running, chunk_size=self.chunk_size, reuse_prefixes=self.reuse_prefixes
        )
        pending = list(requests)
        arrivals = random.Random(self.arrival_seed)
        for _ in range(MAX_STEPS):
            while pending and (self.arrival_seed is None or arrivals.random() < 0.4):
                scheduler.add(pending.pop(0))
            if not pending and not scheduler.has_work:
                break
            scheduler.step()
        assert all(request.finish_reason is not None for request in requests)
        scheduler.forget_cache()
        assert runner.cache.num_free_pages == runner.cache.num_pages - 1
        return scheduler


def answer(request: Request) -> tuple[object, ...]:
    """All that a client sees of a request that may not depend on its company."""
    return (
        request.output_ids,
        request.output_logprobs,
        request.input_logprobs,
        request.output_top_logprobs,
        request.input_top_logprobs,
        request.finish_reason,
    )


NUMBERS = list(range(24))


def test_answers_do_not_depend_on_company_arrival_chunks_or_cache(runner: ModelRunner, num_threads: int) -> None:
    numbers = NUMBERS if num_threads == 1 else NUMBERS[:8]
    alone = {}
    for number in numbers:
        request = make_request(number)
        Run(reuse_prefixes=False).serve(runner, [request])
        alone[number] = answer(request)
    for seed, run in enumerate(
        (Run(), Run(arrival_seed=1), Run(chunk_size=17), Run(max_running=3, arrival_seed=2), Run(reuse_prefixes=False))
    ):
        order = random.Random(seed).sample(numbers, len(numbers))
        requests = {number: make_request(number) for number in order}
        run.serve(runner, list(requests.values()))
        for number, request in requests.items():
            assert answer(request) == alone[number], f"request {number} under {run}"


def test_preempted_requests_go_on_as_if_nothing_happened(runner: ModelRunner) -> None:
    def make_long(number: int) -> Request:
        request = make_request(number)
        request.params = dataclasses.replace(request.params, max_new_tokens=90)
        return request

    expected = [make_long(number) for number in NUMBERS]
    Run().serve(runner, expected)
    with small_cache(runner, num_tokens=400):
        requests = [make_long(number) for number in NUMBERS]
        scheduler = Run().serve(runner, requests)
    assert scheduler.counters.num_retractions > 0
    assert [answer(request) for request in requests] == [answer(request) for request in expected]


class small_cache:
    """Gives the runner a small cache for a while."""

    def __init__(self, runner: ModelRunner, *, num_tokens: int) -> None:
        self._runner, self._before = runner, runner.cache
        shape = runner.cache.layer(0).shape
        self._small = KVCache(
            int(runner.text_config.num_hidden_layers),
            shape[1],
            shape[-1],
            num_tokens=num_tokens,
            dtype=runner.dtype,
            device=runner.device,
        )

    def __enter__(self) -> None:
        self._runner.use_cache(self._small)

    def __exit__(self, *_: object) -> None:
        self._runner.use_cache(self._before)


def test_samples_of_a_prompt_compute_it_once(runner: ModelRunner) -> None:
    requests = [make_request(0) for _ in range(8)]
    for request in requests:
        request.tokens = list(range(10, 50))
        request.prompt_length = request.logprob_start_len = 40
    scheduler = Run().serve(runner, requests)
    assert sorted(request.cached_tokens or 0 for request in requests) == [0] + [39] * 7
    assert scheduler.counters.cached_tokens == 7 * 39


def test_requests_start_in_the_order_of_their_arrival(runner: ModelRunner) -> None:
    scheduler = Scheduler(runner, max_running=2, chunk_size=4096, reuse_prefixes=True)
    requests = [make_request(2 * number) for number in range(6)]
    for request in requests:
        scheduler.add(request)
    started: list[Request] = []
    while scheduler.has_work:
        scheduler.step()
        started += [request for request in requests if request.first_token_at and request not in started]
        assert len(scheduler.running) <= 2
    assert started == requests
    scheduler.forget_cache()


def test_forgetting_the_cache_in_mid_generation_changes_no_answer(runner: ModelRunner) -> None:
    expected, request = make_request(3), make_request(3)
    for item in (expected, request):
        item.params = SamplingParams(max_new_tokens=40)
    Run().serve(runner, [expected])
    scheduler = Scheduler(runner, max_running=4, chunk_size=4096, reuse_prefixes=True)
    scheduler.add(request)
    for step in range(1000):
        if not scheduler.has_work:
            break
        if step % 7 == 3:
            scheduler.forget_cache()
        scheduler.step()
    assert answer(request) == answer(expected)
    assert request.num_retractions > 0
    scheduler.forget_cache()


def test_aborting_returns_all_memory(runner: ModelRunner) -> None:
    scheduler = Scheduler(runner, max_running=3, chunk_size=4096, reuse_prefixes=False)
    requests = [make_request(number) for number in range(8)]
    for request in requests:
        request.params = SamplingParams(max_new_tokens=500)
        request.stop_tokens = frozenset()
        scheduler.add(request)
    for _ in range(5):
        scheduler.step()
    scheduler.abort(requests, "enough")
    assert not scheduler.has_work
    assert runner.cache.num_free_pages == runner.cache.num_pages - 1
    assert {request.finish_reason["type"] for request in requests if request.finish_reason} == {"abort"}
    assert {id(request) for request in scheduler.take_news()} == {id(request) for request in requests}


def test_logits_that_are_not_finite_fail_the_request_and_not_the_next_one(runner: ModelRunner) -> None:
    weight = runner.model.model.norm.weight
    before = weight.clone()
    scheduler = Scheduler(runner, max_running=3, chunk_size=4096, reuse_prefixes=True)
    broken, sound = make_request(9), make_request(9)
    weight.fill_(float("nan"))
    scheduler.add(broken)
    scheduler.step()
    assert broken.error is not None
    assert "not finite" in broken.error
    weight.copy_(before)
    scheduler.forget_cache()
    Run().serve(runner, [sound])
    assert sound.error is None
