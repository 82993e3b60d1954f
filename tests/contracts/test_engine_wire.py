"""The wire protocol of every engine: checked over plain HTTP, against the embedded engine or a running SGLang."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.embedded_engine import EngineUnderTest, running_engine
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Needs = Callable[[str], None]

TOLERANCE = float(os.environ.get("SLIME_ENGINE_TOLERANCE", "1e-5"))
FIRST_TOKEN, LAST_TOKEN = 4, 320
LONG = 1500


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special."""
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]


def params(max_new_tokens: int = 8, **others: Any) -> dict[str, Any]:
    """Sampling parameters that do not end at an end-of-sequence token."""
    return {"max_new_tokens": max_new_tokens, "ignore_eos": True} | others


def teacher_forced(model: PreTrainedModel, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """The log-probability of each token but the first, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def log_probs(answer: dict[str, Any]) -> list[float]:
    """The log-probabilities of the answer's tokens."""
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def assert_same_log_probs(engine: EngineUnderTest, answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two answers have the same log-probabilities: to the bit where the engine promises it (float32 on a CPU)."""
    is_exact = engine.get("/server_info").json.get("is_batch_invariant", False)
    tolerance = 0.0 if is_exact else TOLERANCE
    assert log_probs(answer) == pytest.approx(log_probs(expected), abs=tolerance, rel=0)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Polls the engine until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"


def num_requests(engine: EngineUnderTest) -> int:
    """Requests that run or wait."""
    return engine.get("/get_load").json[0]["num_reqs"]


def start_long(engine: EngineUnderTest, count: int = 1, **body: Any) -> list[Any]:
    """Requests that take long, once all of them are known to the engine."""
    body = {"input_ids": prompt(5), "sampling_params": params(LONG), "return_logprob": True} | body
    futures = [engine.start(**body) for _ in range(count)]
    wait_until(lambda: num_requests(engine) >= count, f"{count} requests at the engine")
    return futures


# information


def test_health_answers(engine: EngineUnderTest) -> None:
    assert engine.get("/health").status == 200
    assert engine.get("/health_generate").status == 200


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info_names_model_and_version(engine: EngineUnderTest, path: str) -> None:
    info = engine.get(path).json
    assert info["model_path"] == str(engine.model_path)
    assert isinstance(info["weight_version"], str)
    assert info["is_generation"] is True


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_names_the_capacity(engine: EngineUnderTest, path: str) -> None:
    assert engine.get(path).json["max_total_num_tokens"] > 0


def test_metrics_count_generated_tokens(engine: EngineUnderTest, needs: Needs) -> None:
    needs("metrics")

    def generated() -> float:
        lines = engine.get("/metrics").raw.decode().splitlines()
        counts = (float(line.split()[-1]) for line in lines if line.startswith("sglang:generation_tokens_total"))
        return next(counts, 0.0)

    before = generated()
    engine.generate(input_ids=prompt(4), sampling_params=params(7))
    assert generated() - before == 7


# tokens and log-probabilities


def test_greedy_tokens_are_those_of_transformers(engine: EngineUnderTest, reference: PreTrainedModel) -> None:
    prompts = [prompt(length) for length in (1, 2, 15, 16, 17, 40, 130)]
    answers = engine.generate(input_ids=prompts, sampling_params=params(20, temperature=0.0))
    for tokens, answer in zip(prompts, answers, strict=True):
        expected = reference.generate(torch.tensor([tokens]), max_new_tokens=20, min_new_tokens=20, do_sample=False)
        assert answer["output_ids"] == expected[0, len(tokens) :].tolist()


def test_a_batch_answers_in_its_order(engine: EngineUnderTest) -> None:
    prompts = [prompt(3 + index, index) for index in range(9)]
    together = engine.generate(input_ids=prompts, sampling_params=params(4, temperature=0.0))
    alone = [engine.generate(input_ids=tokens, sampling_params=params(4, temperature=0.0)) for tokens in prompts]
    assert [answer["output_ids"] for answer in together] == [answer["output_ids"] for answer in alone]
    assert [answer["meta_info"]["prompt_tokens"] for answer in together] == [len(tokens) for tokens in prompts]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_log_probs_are_those_of_the_sampled_distribution(
    engine: EngineUnderTest, reference: PreTrainedModel, temperature: float
) -> None:
    tokens = prompt(21)
    answer = engine.generate(input_ids=tokens, sampling_params=params(24, temperature=temperature), return_logprob=True)
    expected = teacher_forced(reference, tokens + answer["output_ids"], temperature or 1.0)[len(tokens) - 1 :]
    assert [entry[1] for entry in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]
    assert log_probs(answer) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_the_prompt_are_at_the_temperature_too(
    engine: EngineUnderTest, reference: PreTrainedModel, temperature: float, needs: Needs
) -> None:
    if temperature != 1.0:
        needs("log-probs of the prompt at the temperature")
    tokens = prompt(21)
    answer = engine.generate(
        input_ids=tokens, sampling_params=params(1, temperature=temperature), return_logprob=True, logprob_start_len=0
    )
    given = answer["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in given] == tokens
    assert given[0][0] is None
    assert [entry[0] for entry in given[1:]] == pytest.approx(
        teacher_forced(reference, tokens, temperature), abs=TOLERANCE
    )


def test_log_probs_ignore_top_p_and_top_k(engine: EngineUnderTest, reference: PreTrainedModel) -> None:
    tokens = prompt(9)
    sampling = params(16, temperature=0.8, top_p=0.5, top_k=5)
    answer = engine.generate(input_ids=tokens, sampling_params=sampling, return_logprob=True)
    expected = teacher_forced(reference, tokens + answer["output_ids"], 0.8)[len(tokens) - 1 :]
    assert log_probs(answer) == pytest.approx(expected, abs=TOLERANCE)


def test_top_k_and_top_p_bound_what_is_drawn(engine: EngineUnderTest, reference: PreTrainedModel) -> None:
    tokens = prompt(6)
    answers = engine.generate(input_ids=tokens, sampling_params=params(1, temperature=2.0, top_k=3, n=40))
    with torch.no_grad():
        best = reference(torch.tensor([tokens])).logits[0, -1].topk(3).indices.tolist()
    assert {answer["output_ids"][0] for answer in answers} <= set(best)
    narrow = engine.generate(input_ids=tokens, sampling_params=params(1, temperature=2.0, top_p=1e-6, n=20))
    assert {answer["output_ids"][0] for answer in narrow} == {best[0]}


def test_logprob_start_len_bounds_the_given_log_probs(engine: EngineUnderTest, reference: PreTrainedModel) -> None:
    tokens = prompt(30)
    engine.generate(input_ids=tokens, sampling_params=params(1))
    answer = engine.generate(input_ids=tokens, sampling_params=params(1), return_logprob=True, logprob_start_len=12)
    given = answer["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in given] == tokens[12:]
    assert given[0][0] is None
    expected = teacher_forced(reference, tokens)[12:]
    assert [entry[0] for entry in given[1:]] == pytest.approx(expected, abs=TOLERANCE)


def test_no_new_tokens_scores_the_prompt_alone(
    engine: EngineUnderTest, reference: PreTrainedModel, needs: Needs
) -> None:
    needs("max_new_tokens=0")
    tokens = prompt(25)
    answer = engine.generate(
        input_ids=tokens, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
    )
    assert answer["output_ids"] == []
    measured = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    assert measured == pytest.approx(teacher_forced(reference, tokens), abs=TOLERANCE)


def test_top_logprobs_are_sorted_and_hold_the_greedy_token(engine: EngineUnderTest) -> None:
    answer = engine.generate(
        input_ids=prompt(8), sampling_params=params(3, temperature=0.0), return_logprob=True, top_logprobs_num=4
    )
    for token, top in zip(answer["output_ids"], answer["meta_info"]["output_top_logprobs"], strict=True):
        assert len(top) == 4
        assert top[0][1] == token
        assert [entry[0] for entry in top] == sorted((entry[0] for entry in top), reverse=True)


def test_log_probs_carry_their_text_on_demand(engine: EngineUnderTest, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = engine.generate(
        input_ids=prompt(8), sampling_params=params(3), return_logprob=True, return_text_in_logprobs=True
    )
    entries = answer["meta_info"]["output_token_logprobs"]
    assert [entry[2] for entry in entries] == [tokenizer.decode([token]) for token in answer["output_ids"]]


def test_one_seed_gives_one_answer_whatever_runs_beside_it(engine: EngineUnderTest, needs: Needs) -> None:
    needs("sampling_seed")
    body = {"input_ids": prompt(12), "sampling_params": params(30, sampling_seed=7), "return_logprob": True}
    alone = engine.generate(**body)
    noise = [engine.start(input_ids=prompt(3 + i, i), sampling_params=params(10 + 3 * i)) for i in range(12)]
    crowded = engine.generate(**body)
    for future in noise:
        future.result()
    assert crowded["output_ids"] == alone["output_ids"]
    assert_same_log_probs(engine, crowded, alone)
    other = engine.generate(**(body | {"sampling_params": params(30, sampling_seed=8)}))
    assert other["output_ids"] != alone["output_ids"]


def test_n_gives_different_samples(engine: EngineUnderTest) -> None:
    answers = engine.generate(input_ids=prompt(12), sampling_params=params(12, n=4), rid="several")
    assert len(answers) == 4
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 4
    assert len({answer["meta_info"]["id"] for answer in answers}) == 4


# where an answer ends


def test_an_answer_ends_at_its_length(engine: EngineUnderTest) -> None:
    meta_info = engine.generate(input_ids=prompt(4), sampling_params=params(5))["meta_info"]
    assert meta_info["finish_reason"] == {"type": "length", "length": 5}
    assert meta_info["completion_tokens"] == 5


def test_a_stop_token_ends_the_answer_and_is_kept_in_its_tokens(
    engine: EngineUnderTest, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole_characters = tokenizer.encode("the answer is")  # else SGLang counts a half one's rest to the prompt
    free = engine.generate(input_ids=whole_characters, sampling_params=params(12, temperature=0.0))["output_ids"]
    stop = free[6]
    position = free.index(stop)
    sampling = {"max_new_tokens": 12, "temperature": 0.0, "stop_token_ids": [stop]}
    answer = engine.generate(input_ids=whole_characters, sampling_params=sampling)
    assert answer["output_ids"] == free[: position + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == tokenizer.decode(free[:position])


def test_the_end_of_sequence_token_ends_the_answer_unless_ignored(
    engine: EngineUnderTest, tokenizer: PreTrainedTokenizerBase
) -> None:
    sampling = {"max_new_tokens": 300, "temperature": 1.5, "n": 8}
    answers = engine.generate(input_ids=prompt(5), sampling_params=sampling)
    ended = [answer for answer in answers if answer["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended
    for answer in ended:
        assert answer["output_ids"].index(tokenizer.eos_token_id) == len(answer["output_ids"]) - 1
    for answer in engine.generate(input_ids=prompt(5), sampling_params=sampling | {"ignore_eos": True}):
        assert answer["meta_info"]["completion_tokens"] == 300


def test_min_new_tokens_keeps_the_answer_from_ending(engine: EngineUnderTest) -> None:
    free = engine.generate(input_ids=prompt(5), sampling_params=params(12, temperature=0.0))["output_ids"]
    sampling = {"max_new_tokens": 20, "min_new_tokens": 9, "temperature": 0.0, "stop_token_ids": [free[1]]}
    answer = engine.generate(input_ids=prompt(5), sampling_params=sampling)
    assert free[1] not in answer["output_ids"][:9]
    assert len(answer["output_ids"]) >= 9


@pytest.mark.parametrize("no_stop_trim", [False, True])
def test_a_stop_string_ends_the_answer_across_token_borders(engine: EngineUnderTest, no_stop_trim: bool) -> None:
    seen = [
        engine.generate(input_ids=prompt(5, seed), sampling_params=params(40, temperature=0.0)) for seed in range(8)
    ]
    clean = next(a for a in seen if any(c.isascii() for c in a["text"]) and "\ufffd\ufffd" not in a["text"][3:9])
    place = next(i for i in range(2, len(clean["text"]) - 3) if "\ufffd" not in clean["text"][i : i + 3])
    stop = clean["text"][place : place + 3]
    seed = seen.index(clean)
    sampling = params(40, temperature=0.0, stop=["never seen", stop], no_stop_trim=no_stop_trim)
    answer = engine.generate(input_ids=prompt(5, seed), sampling_params=sampling)
    end = clean["text"].find(stop) + (len(stop) if no_stop_trim else 0)
    assert answer["text"] == clean["text"][:end]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["output_ids"] == clean["output_ids"][: len(answer["output_ids"])]
    assert len(answer["output_ids"]) < 40


def test_special_tokens_are_in_the_text_on_demand(engine: EngineUnderTest, tokenizer: PreTrainedTokenizerBase) -> None:
    answer = engine.generate(
        input_ids=prompt(5), sampling_params=params(200, temperature=3.0, skip_special_tokens=False)
    )
    special = range(1, FIRST_TOKEN)  # 0 is also what SGLang writes for tokens that the tokenizer does not have
    written = {token: answer["text"].count(tokenizer.decode([token])) for token in special}
    assert written == {token: answer["output_ids"].count(token) for token in special}
    assert any(written.values())


# streaming


def test_a_stream_ends_with_the_whole_answer(engine: EngineUnderTest) -> None:
    body = {"input_ids": prompt(7), "sampling_params": params(24, temperature=0.0), "return_logprob": True}
    whole = engine.generate(**body)
    events = engine.stream("/generate", body | {"stream": True})
    assert len(events) > 1
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert log_probs(events[-1]) == pytest.approx(log_probs(whole), abs=TOLERANCE)
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])


def test_a_stream_never_takes_text_back(engine: EngineUnderTest, needs: Needs) -> None:
    needs("streams hold back incomplete characters")
    for seed in range(4):
        sampling = params(60, temperature=1.0, sampling_seed=seed)
        events = engine.stream("/generate", {"text": "5 €", "stream": True, "sampling_params": sampling})
        final = events[-1]["text"]
        assert all(final.startswith(event["text"]) for event in events)


def test_streams_of_several_samples_are_told_apart(engine: EngineUnderTest) -> None:
    events = engine.stream("/generate", {"input_ids": prompt(5), "stream": True, "sampling_params": params(6, n=3)})
    final = {event["index"]: event for event in events}
    assert sorted(final) == [0, 1, 2]
    assert all(len(event["output_ids"]) == 6 for event in final.values())


# the cache


def test_a_repeated_prompt_is_not_computed_again(engine: EngineUnderTest) -> None:
    body = {"input_ids": prompt(50, 1), "sampling_params": params(2)}
    engine.post("/flush_cache")
    assert engine.generate(**body)["meta_info"]["cached_tokens"] == 0
    assert engine.generate(**body)["meta_info"]["cached_tokens"] == 49


def test_samples_of_one_prompt_share_it(engine: EngineUnderTest) -> None:
    engine.post("/flush_cache")
    answers = engine.generate(input_ids=prompt(41, 2), sampling_params=params(3, n=4))
    assert sum(answer["meta_info"]["cached_tokens"] for answer in answers) >= 3 * 40


def test_equal_prompts_that_arrive_together_share(engine: EngineUnderTest, needs: Needs) -> None:
    needs("sharing within a batch")
    engine.post("/flush_cache")
    answers = engine.generate(input_ids=[prompt(13, 3)] * 6, sampling_params=params(3))
    assert sorted(answer["meta_info"]["cached_tokens"] for answer in answers) == [0] + [12] * 5


def test_a_conversation_goes_on_from_the_cache(engine: EngineUnderTest) -> None:
    engine.post("/flush_cache")
    first = engine.generate(input_ids=prompt(20, 4), sampling_params=params(20))
    longer = prompt(20, 4) + first["output_ids"] + prompt(5, 5)
    assert engine.generate(input_ids=longer, sampling_params=params(2))["meta_info"]["cached_tokens"] >= 39


def test_a_flushed_cache_is_empty(engine: EngineUnderTest) -> None:
    engine.generate(input_ids=prompt(50, 6), sampling_params=params(2))
    assert engine.post("/flush_cache").status == 200
    assert engine.generate(input_ids=prompt(50, 6), sampling_params=params(2))["meta_info"]["cached_tokens"] == 0


def test_the_cache_is_not_flushed_under_running_requests(engine: EngineUnderTest) -> None:
    (future,) = start_long(engine)
    assert engine.post("/flush_cache").status == 400
    engine.post("/abort_request", {"abort_all": True})
    future.result()


# abort, pause, continue


def test_an_aborted_request_answers_with_what_it_has(engine: EngineUnderTest) -> None:
    (future,) = start_long(engine, rid="to-abort")
    wait_until(lambda: engine.get("/get_load").json[0]["num_waiting_reqs"] == 0, "the request runs")
    assert engine.post("/abort_request", {"rid": "to-abort"}).status == 200
    answer = future.result()
    count = answer["meta_info"]["completion_tokens"]
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 <= count < LONG
    assert len(answer["output_ids"]) == len(log_probs(answer)) == count


def test_abort_all_ends_every_request(engine: EngineUnderTest) -> None:
    futures = start_long(engine, 5)
    engine.post("/abort_request", {"abort_all": True})
    answers = [future.result() for future in futures]
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort"] * 5
    wait_until(lambda: num_requests(engine) == 0, "no request left")


def test_abort_of_an_unknown_request_is_no_error(engine: EngineUnderTest) -> None:
    assert engine.post("/abort_request", {"rid": "nobody"}).status == 200


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_paused_generation_goes_on_as_if_nothing_happened(engine: EngineUnderTest, mode: str, needs: Needs) -> None:
    needs("sampling_seed")
    body = {"input_ids": prompt(30, 7), "sampling_params": params(200, sampling_seed=3), "return_logprob": True}
    undisturbed = engine.generate(**body)
    (future,) = start_long(engine, **body)
    assert engine.post("/pause_generation", {"mode": mode}).status == 200
    late = engine.start(input_ids=prompt(4), sampling_params=params(4))
    wait_until(lambda: num_requests(engine) >= 1, "the late request waits")
    assert not late.done()
    assert engine.post("/continue_generation", {}).status == 200
    answer = future.result()
    assert answer["output_ids"] == undisturbed["output_ids"]
    assert_same_log_probs(engine, answer, undisturbed)
    assert late.result()["meta_info"]["finish_reason"]["type"] == "length"


def test_pausing_with_abort_ends_what_runs(engine: EngineUnderTest) -> None:
    futures = start_long(engine, 3)
    engine.post("/pause_generation", {"mode": "abort"})
    assert [future.result()["meta_info"]["finish_reason"]["type"] for future in futures] == ["abort"] * 3
    engine.post("/continue_generation", {})
    assert engine.generate(input_ids=prompt(3), sampling_params=params(2))["meta_info"]["completion_tokens"] == 2


def test_a_client_that_goes_away_aborts_its_request(engine: EngineUnderTest) -> None:
    host = urllib.parse.urlsplit(engine.url).netloc
    connection = http.client.HTTPConnection(host)
    body = json.dumps({"input_ids": prompt(5), "sampling_params": params(LONG)})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"} | engine.headers)
    wait_until(lambda: num_requests(engine) == 1, "the request arrived")
    connection.close()
    started = time.monotonic()
    wait_until(lambda: num_requests(engine) == 0, "the request is gone")
    assert time.monotonic() - started < 10


# weights


def test_weights_from_disk_replace_the_model(
    engine: EngineUnderTest, other_model: Path, other_reference: PreTrainedModel, first_weights: None
) -> None:
    engine.generate(input_ids=prompt(40), sampling_params=params(2))
    body = {"model_path": str(other_model), "weight_version": "second"}
    answer = engine.post("/update_weights_from_disk", body)
    assert (answer.status, answer.json["success"]) == (200, True)
    assert engine.get("/model_info").json["weight_version"] == "second"
    check_weights(engine, other_reference, "second")


def check_weights(engine: EngineUnderTest, model: PreTrainedModel, version: str) -> None:
    """The engine answers as `model` does, from an empty cache."""
    tokens = prompt(40)
    answer = engine.generate(input_ids=tokens, sampling_params=params(8), return_logprob=True, logprob_start_len=0)
    assert answer["meta_info"]["weight_version"] == version
    assert answer["meta_info"]["cached_tokens"] == 0
    expected = teacher_forced(model, tokens + answer["output_ids"])
    measured = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]] + log_probs(answer)
    assert measured == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_an_update_in_the_middle_of_a_generation_is_seen_in_its_versions(
    engine: EngineUnderTest,
    reference: PreTrainedModel,
    other_model: Path,
    other_reference: PreTrainedModel,
    first_weights: None,
    mode: str,
    needs: Needs,
) -> None:
    needs("prefixes forgotten at an update under requests")
    (future,) = start_long(engine)
    load = {"num_tokens": 0}

    def has_generated() -> bool:
        load.update(engine.get("/get_load").json[0])
        return load["num_tokens"] >= 48

    wait_until(has_generated, "some tokens under the first weights")
    engine.post("/pause_generation", {"mode": mode})
    body = {"model_path": str(other_model), "weight_version": "second", "flush_cache": False}
    assert engine.post("/update_weights_from_disk", body).status == 200
    engine.post("/continue_generation", {})
    answer = future.result()
    old, new = answer["meta_info"]["weight_versions"]
    assert (old["start"], old["end"], new["end"]) == (0, new["start"], LONG)
    assert new["version"] == answer["meta_info"]["weight_version"] == "second"
    tokens, first = prompt(5) + answer["output_ids"], len(prompt(5)) - 1
    before = teacher_forced(reference, tokens)[first : first + old["end"]]
    assert log_probs(answer)[: old["end"]] == pytest.approx(before, abs=TOLERANCE)
    after = teacher_forced(other_reference, tokens)[first + old["end"] :]
    assert log_probs(answer)[old["end"] :] == pytest.approx(after, abs=TOLERANCE)


def test_a_checkpoint_that_does_not_fit_changes_nothing(
    engine: EngineUnderTest, reference: PreTrainedModel, tmp_path: Path, needs: Needs
) -> None:
    needs("strict weight updates")
    from helpers.tiny_models import make_tiny_model

    wide = make_tiny_model(tmp_path / "wide", intermediate_size=192)
    answer = engine.post("/update_weights_from_disk", {"model_path": str(wide)})
    assert answer.status == 400
    assert "mlp" in answer.json["message"]
    assert "192" in answer.json["message"]
    engine.post("/flush_cache")
    check_weights(engine, reference, engine.get("/model_info").json["weight_version"])


def test_a_missing_checkpoint_is_an_error(engine: EngineUnderTest) -> None:
    assert engine.post("/update_weights_from_disk", {"model_path": "/no/such/folder"}).status == 400


def test_checksums_are_those_of_the_checkpoint(engine: EngineUnderTest, needs: Needs) -> None:
    needs("checksums")
    from safetensors.torch import load_file

    from slime.utils.checksum import tensor_checksum

    expected = {
        name: tensor_checksum(tensor) for name, tensor in load_file(engine.model_path / "model.safetensors").items()
    }
    assert engine.post("/weights_checker", {"action": "checksum"}).json["checksums"] == expected


def test_a_weight_can_be_read_by_name(engine: EngineUnderTest, reference: PreTrainedModel, needs: Needs) -> None:
    needs("get_weights_by_name")
    values = engine.post("/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": 3}).json
    assert values == reference.model.norm.weight[:3].tolist()


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_weights_arrive_pickled_in_requests(
    engine: EngineUnderTest, other_reference: PreTrainedModel, first_weights: None, load_format: str | None
) -> None:
    from helpers.weight_senders import serialize

    named = [(name, parameter.data) for name, parameter in other_reference.named_parameters()]
    half = len(named) // 2
    for part in (named[:half], named[half:]):
        body = {
            "serialized_named_tensors": [serialize(part, load_format)],
            "load_format": load_format,
            "weight_version": "pickled",
        }
        answer = engine.post("/update_weights_from_tensor", body)
        assert answer.status == 200, answer.raw
    check_weights(engine, other_reference, "pickled")


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_weights_arrive_by_broadcast(
    engine: EngineUnderTest, other_reference: PreTrainedModel, first_weights: None, load_format: str | None
) -> None:
    from helpers.weight_senders import Broadcaster

    named = [(name, parameter.data) for name, parameter in other_reference.named_parameters()]
    broadcaster = Broadcaster(engine)
    broadcaster.send(named, load_format, version="broadcast")
    broadcaster.close()
    check_weights(engine, other_reference, "broadcast")


# memory


def test_released_memory_is_taken_again(engine: EngineUnderTest, reference: PreTrainedModel) -> None:
    assert engine.post("/release_memory_occupation", {"tags": ["kv_cache"]}).status == 200
    assert engine.post("/release_memory_occupation", {"tags": ["weights"]}).status == 200
    if engine.is_embedded:
        assert engine.post("/generate", {"text": "hello"}).status == 503
    assert engine.post("/resume_memory_occupation", {"tags": ["weights"]}).status == 200
    assert engine.post("/resume_memory_occupation", {"tags": ["kv_cache"]}).status == 200
    engine.post("/flush_cache")
    check_weights(engine, reference, engine.get("/model_info").json["weight_version"])


@pytest.fixture(scope="module")
def small_engine(engine: EngineUnderTest) -> Any:
    """An engine with a key and little memory."""
    if not engine.is_embedded:
        pytest.skip("starts the embedded engine with other flags")
    flags = [
        "--max-total-tokens",
        "256",
        "--max-running-requests",
        "16",
        "--api-key",
        "secret",
        "--context-length",
        "200",
    ]
    flags += ["--served-model-name", "small", "--chunked-prefill-size", "32"]
    with running_engine(engine.model_path, *flags, headers={"Authorization": "Bearer secret"}) as running:
        yield running


def test_little_memory_makes_requests_wait_and_changes_no_answer(
    engine: EngineUnderTest, small_engine: EngineUnderTest
) -> None:
    prompts = [prompt(10 + 3 * index, index) for index in range(20)]
    body = {"input_ids": prompts, "sampling_params": params(60, sampling_seed=5), "return_logprob": True}
    small, large = small_engine.generate(**body), engine.generate(**body)
    assert [answer["output_ids"] for answer in small] == [answer["output_ids"] for answer in large]
    for answer, expected in zip(small, large, strict=True):
        assert_same_log_probs(engine, answer, expected)


def test_a_request_that_can_never_fit_is_refused(small_engine: EngineUnderTest) -> None:
    answer = small_engine.post("/generate", {"input_ids": prompt(150), "sampling_params": params(100)})
    assert answer.status == 400
    assert "200 tokens" in answer.json["error"]["message"]


def test_without_its_key_nothing_but_health_is_answered(small_engine: EngineUnderTest) -> None:
    stranger = EngineUnderTest(small_engine.url, small_engine.model_path)
    assert stranger.get("/health").status == 200
    assert stranger.post("/generate", {"text": "hello"}).status == 401
    assert stranger.get("/server_info").status == 401
    assert "secret" not in small_engine.get("/server_info").raw.decode()


# OpenAI's protocol


def test_models_lists_the_model(engine: EngineUnderTest) -> None:
    (model,) = engine.get("/v1/models").json["data"]
    assert model["object"] == "model"
    assert model["max_model_len"] == 2048


def test_a_chat_is_the_templated_prompt(engine: EngineUnderTest, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 17 + 25 ?"}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    plain = engine.generate(input_ids=tokens, sampling_params=params(12, temperature=0.0))
    chat = engine.post(
        "/v1/chat/completions",
        {
            "model": "any",
            "messages": messages,
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": True,
        },
    ).json
    (choice,) = chat["choices"]
    assert choice["message"] == {"role": "assistant", "content": plain["text"]} | choice["message"]
    assert choice["message"]["content"] == plain["text"]
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["content"]) == 12
    assert chat["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": 12,
        "total_tokens": len(tokens) + 12,
    } | {
        key: value
        for key, value in chat["usage"].items()
        if key not in ("prompt_tokens", "completion_tokens", "total_tokens")
    }


def test_streamed_chat_pieces_make_the_whole(engine: EngineUnderTest) -> None:
    body = {"model": "any", "messages": [{"role": "user", "content": "1 2 3"}], "max_tokens": 30, "temperature": 0}
    whole = engine.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    events = engine.stream("/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(pieces) == whole
    assert events[-1]["usage"]["completion_tokens"] > 0


def test_completions_continue_text_and_tokens(engine: EngineUnderTest, tokenizer: PreTrainedTokenizerBase) -> None:
    body = {"model": "any", "max_tokens": 9, "temperature": 0, "logprobs": 2}
    text = engine.post("/v1/completions", body | {"prompt": "the answer is"}).json
    tokens = engine.post("/v1/completions", body | {"prompt": tokenizer.encode("the answer is")}).json
    both = engine.post("/v1/completions", body | {"prompt": ["the answer is", "hello"], "n": 2}).json
    assert text["choices"][0]["text"] == tokens["choices"][0]["text"]
    assert len(text["choices"][0]["logprobs"]["token_logprobs"]) == text["usage"]["completion_tokens"]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]


# what cannot be served

BAD_BODIES: dict[str, dict[str, Any]] = {
    "no prompt": {"sampling_params": {}},
    "two prompts": {"text": "a", "input_ids": [5]},
    "empty prompt": {"input_ids": []},
    "token outside the vocabulary": {"input_ids": [5, 320]},
    "negative token": {"input_ids": [-1]},
    "longer than the context": {"input_ids": [5] * 2048},
    "answer longer than the context": {"input_ids": [5] * 2000, "sampling_params": {"max_new_tokens": 49}},
    "temperature below 0": {"text": "a", "sampling_params": {"temperature": -1}},
    "top_p of 0": {"text": "a", "sampling_params": {"top_p": 0}},
    "top_k of 0": {"text": "a", "sampling_params": {"top_k": 0}},
    "negative length": {"text": "a", "sampling_params": {"max_new_tokens": -1}},
    "min above max": {"text": "a", "sampling_params": {"max_new_tokens": 2, "min_new_tokens": 3}},
    "unknown sampling parameter": {"text": "a", "sampling_params": {"temprature": 1}},
    "logprob_start_len beyond the prompt": {"input_ids": [5, 6], "return_logprob": True, "logprob_start_len": 9},
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_requests_are_answered_with_400_and_one_sentence(engine: EngineUnderTest, name: str) -> None:
    if name in os.environ.get("SLIME_ENGINE_LACKS", "").split(","):
        pytest.skip("the engine takes it")
    answer = engine.post("/generate", BAD_BODIES[name])
    assert answer.status == 400
    message = answer.json["error"]["message"]
    assert len(message) > 10
    assert "\n" not in message


def test_a_body_that_is_not_json_is_refused(engine: EngineUnderTest) -> None:
    assert engine.post("/generate", raw=b'{"text": ').status in (400, 422)
    assert engine.post("/generate", raw=b"[1]").status in (400, 422)


def test_an_unknown_pause_mode_is_refused(engine: EngineUnderTest) -> None:
    assert engine.post("/pause_generation", {"mode": "gently"}).status in (400, 422)
