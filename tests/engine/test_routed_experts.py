"""Which experts the embedded engine says that tokens had: those of transformers, however they were computed."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.kv_cache import KVCache
from slime.engine.embedded.model_runner import ModelRunner
from slime.engine.embedded.outputs import OutputBuilder
from slime.engine.embedded.protocol import BadRequest, Limits, RequestParser
from slime.engine.embedded.refusal import Refused
from slime.engine.embedded.request import Request
from slime.engine.embedded.sampling_params import SamplingParams
from slime.engine.embedded.scheduler import Scheduler

LAYERS = 3
OPTIONS = {"num_hidden_layers": LAYERS, "mlp_only_layers": [1]}  # the second is dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", **OPTIONS)


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    args = ServerArgs(model_path=str(folder), max_total_tokens=4096, enable_return_routed_experts=True, num_threads=1)
    return ModelRunner(args)


def request_for(prompt: list[int], *, num_new: int = 12, start: int = 0) -> Request:
    return Request(
        str(prompt[-1]),
        list(prompt),
        len(prompt),
        SamplingParams(max_new_tokens=num_new, temperature=1.0, ignore_eos=True),
        seed=len(prompt),
        stop_tokens=frozenset(),
        listener=lambda _: None,
        logprob_start_len=len(prompt),
        return_routed_experts=True,
        routed_experts_start_len=start,
    )


def served(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()


def told(request: Request) -> np.ndarray:
    """As a client reads it, sorted."""
    encoded = OutputBuilder(request, _Decoder()).build("0")["meta_info"]["routed_experts"]
    return np.sort(np.frombuffer(base64.b64decode(encoded), dtype=np.int32).reshape(-1, LAYERS, 2))


class _Decoder:
    def decode(self, *args: object, **options: object) -> str:
        return ""


def expected(folder: Path, tokens: list[int]) -> np.ndarray:
    """[tokens, layers, 2], sorted, by transformers; zeros for the dense layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    chosen = [layer.topk(2).indices.sort().values.numpy() for layer in logits]
    return np.stack([chosen[0], np.zeros_like(chosen[0]), chosen[1]], axis=1)


def test_experts_are_those_of_transformers_whatever_the_cache_knows(folder: Path, runner: ModelRunner) -> None:
    scheduler = Scheduler(runner, max_running=4, chunk_size=16, reuse_prefixes=True)
    prompt = list(range(4, 45))
    first, other = request_for(prompt), request_for([*prompt[:38], 7, 8])
    served(scheduler, first)
    served(scheduler, other)
    assert other.cached_tokens == 38, "more than a page, and a part of one"
    last = request_for(first.tokens, start=len(first.tokens) - 1)
    served(scheduler, last)
    for request, start in ((first, 0), (other, 0), (last, len(first.tokens) - 1)):
        rows = told(request)
        assert rows.shape == (len(request.tokens) - 1 - start, LAYERS, 2)
        np.testing.assert_array_equal(rows, expected(folder, request.tokens)[start:-1])


def test_a_request_that_gave_its_memory_back_tells_what_its_tokens_first_had(folder: Path) -> None:
    args = ServerArgs(model_path=str(folder), max_total_tokens=4096, enable_return_routed_experts=True, num_threads=1)
    runner = ModelRunner(args)
    scheduler = Scheduler(runner, max_running=2, chunk_size=16, reuse_prefixes=True)
    request = request_for(list(range(4, 10)), num_new=8)
    scheduler.add(request)
    for _ in range(4):
        scheduler.step()
    num_first = request.num_computed
    first = expected(folder, request.tokens)[:num_first]
    with torch.no_grad():
        for name, parameter in runner.model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.neg_()
    scheduler.forget_cache()
    served(scheduler)
    assert request.num_retractions == 1
    rows = told(request)
    assert len(rows) == len(request.tokens) - 1
    np.testing.assert_array_equal(rows[:num_first], first)
    assert (rows[num_first:] != expected(folder, request.tokens)[num_first:-1]).any(), "of the new weights"


def test_a_smaller_cache_takes_its_place(folder: Path, runner: ModelRunner) -> None:
    cache = runner.cache
    small = KVCache(LAYERS, 2, 16, num_tokens=64, dtype=torch.float32, device=torch.device("cpu"))
    runner.use_cache(small)
    try:
        request = request_for(list(range(4, 20)))
        served(Scheduler(runner, max_running=1, chunk_size=16, reuse_prefixes=False), request)
    finally:
        runner.use_cache(cache)
        runner.check_attention()
    np.testing.assert_array_equal(told(request), expected(folder, request.tokens)[:-1])


def test_a_dense_model_and_an_engine_that_was_not_asked_are_refused(tmp_path: Path) -> None:
    dense = make_tiny_model(tmp_path / "dense")
    with pytest.raises(Refused, match="--enable-return-routed-experts: Qwen3ForCausalLM has no experts"):
        ModelRunner(ServerArgs(model_path=str(dense), max_total_tokens=64, enable_return_routed_experts=True))
    parser = RequestParser(None, Limits(64, 64, 320, frozenset()), random_seed=0)
    body = {"input_ids": [5], "return_routed_experts": True, "sampling_params": {"max_new_tokens": 4}}
    with pytest.raises(BadRequest, match="an engine started with --enable-return-routed-experts"):
        parser.parse(body, lambda _: None)
    parser = RequestParser(None, Limits(64, 64, 320, frozenset(), returns_experts=True), random_seed=0)
    with pytest.raises(BadRequest, match="routed_experts_start_len must lie between 0 and .* 1, got 2"):
        parser.parse(body | {"routed_experts_start_len": 2}, lambda _: None)
