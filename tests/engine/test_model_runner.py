"""Which models are served, and which are refused by name."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from slime.engine.embedded import model_runner
from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.model_runner import ModelRunner, eos_token_ids
from slime.engine.embedded.plan import Batch
from slime.engine.embedded.refusal import Refused
from slime.engine.embedded.request import Request
from slime.engine.embedded.sampling_params import SamplingParams
from slime.engine.embedded.scheduler import Scheduler

SMALL_WINDOW = {"head_dim": 16, "sliding_window": 8}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

SERVED: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "mistral": SMALL_WINDOW,
    "gemma2": SMALL_WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": SMALL_WINDOW,
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0},
    "qwen3_moe": {},
    "mixtral": {"num_local_experts": 4},
    "glm4_moe": EXPERTS | {"head_dim": 16, "first_k_dense_replace": 1},
    "deepseek_v3": EXPERTS
    | {"n_group": 1, "topk_group": 1, "kv_lora_rank": 24, "q_lora_rank": 32, "num_key_value_heads": 4}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, "layers of type mamba"),
    "gpt_oss": ({"head_dim": 16, "num_local_experts": 4}, "more than causal attention"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "attention cannot be replaced"),
}


def load(folder: Path, **settings: Any) -> ModelRunner:
    return ModelRunner(ServerArgs(model_path=str(folder), max_total_tokens=1024, **settings))


@pytest.mark.parametrize("architecture", SERVED)
def test_served_models_generate_what_transformers_does(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / architecture, architecture, **SERVED[architecture])
    scheduler = Scheduler(load(folder), max_running=4, chunk_size=16, reuse_prefixes=True)
    prompts = [list(range(4, 4 + length)) for length in (3, 20, 33)]
    requests = [
        Request(
            str(len(tokens)),
            list(tokens),
            len(tokens),
            SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True),
            seed=0,
            stop_tokens=frozenset(),
            listener=lambda _: None,
            logprob_start_len=len(tokens),
        )
        for tokens in prompts
    ]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for tokens, request in zip(prompts, requests, strict=True):
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "use_cache": False}
        expected = reference.generate(torch.tensor([tokens]), **options)
        assert request.tokens == expected[0].tolist()


@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_cannot_be_served_are_refused_in_one_sentence(architecture: str, tmp_path: Path) -> None:
    fields, reason = REFUSED[architecture]
    folder = make_tiny_model(tmp_path / architecture, architecture, **fields)
    with pytest.raises(Refused, match=reason) as refusal:
        load(folder)
    assert "Use SGLang for it." in str(refusal.value)


def test_a_low_precision_model_is_served_and_not_called_exact(tmp_path: Path) -> None:
    runner = load(make_tiny_model(tmp_path / "model", dtype="bfloat16"))
    assert runner.dtype == torch.bfloat16
    assert not runner.is_exact
    assert load(tmp_path / "model", dtype="float32").is_exact


def run(runner: ModelRunner) -> list[list[tuple[int, float]]]:
    """Tokens and log-probabilities of several seeded requests, some of whose prompts go in chunks."""
    scheduler = Scheduler(runner, max_running=16, chunk_size=64, reuse_prefixes=True)
    requests = [
        Request(
            str(seed),
            [4 + (seed * 7 + place) % 90 for place in range(3 + seed * 5)],
            3 + seed * 5,
            SamplingParams(max_new_tokens=8, ignore_eos=True),
            seed=seed,
            stop_tokens=frozenset(),
            listener=lambda _: None,
            return_logprob=True,
            logprob_start_len=seed,
        )
        for seed in range(12)
    ]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    assert all(request.error is None for request in requests)
    inputs = [[(-1, item.log_prob or 0.0) for item in request.input_logprobs] for request in requests]
    outputs = [list(zip(request.output_ids, request.output_logprobs, strict=True)) for request in requests]
    return inputs + outputs


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "gemma2"])
def test_shares_in_threads_compute_to_the_bit_what_one_does(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture, **SERVED.get(architecture, {}))
    alone = run(load(folder, num_threads=1))
    monkeypatch.setattr(model_runner, "MIN_SHARE_WORK", 1)
    assert run(load(folder, num_threads=3)) == alone


def test_a_share_that_fails_fails_the_pass_once_all_have_ended(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "MIN_SHARE_WORK", 1)
    runner = load(tiny_model, num_threads=2)
    forward, ended = runner._forward_share, []

    def failing(batch: Batch, rows: list[int]) -> torch.Tensor:
        logits = forward(batch, rows)
        ended.append(threading.current_thread().name)
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError("broken")
        return logits

    monkeypatch.setattr(runner, "_forward_share", failing)
    with pytest.raises(RuntimeError, match="broken"):
        run(runner)
    assert len(ended) == 2


@pytest.mark.parametrize("limit", [0, 1 << 60])
def test_the_operations_of_small_models_run_in_one_thread_of_large_ones_in_all(
    limit: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(model_runner, "SMALL_MODEL_PARAMETERS", limit)
    try:
        runner = load(tiny_model, num_threads=2)
        assert torch.get_num_threads() == (1 if limit else 2)
        torch.set_num_threads(3)
        runner.set_threads()
        assert torch.get_num_threads() == (1 if limit else 2)
    finally:
        torch.set_num_threads(before)


def test_answers_end_at_the_tokens_that_config_and_tokenizer_name(tiny_model: Path) -> None:
    runner = load(tiny_model)
    runner.model.generation_config.eos_token_id = [7, 8]
    assert eos_token_ids(runner.model, tokenizer=None) == {2, 7, 8}


def test_the_default_cache_takes_memory_only_as_it_is_used(tiny_model: Path) -> None:
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    runner = ModelRunner(ServerArgs(model_path=str(tiny_model)))
    assert runner.cache.num_bytes > 200 << 20
    assert process.memory_info().rss - before < 100 << 20
