"""What `benchmarks.gpu.megatron` runs on a GPU, with a tiny model on the CPU: every part gives its columns."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch
from helpers.megatron_cpu import megatron_on_cpu
from helpers.tiny_models import make_tiny_model
from helpers.training import world_of_one

from benchmarks.gpu import megatron, steps, train

CPU = ["--device", "cpu", "--custom-megatron-init-path", "builtins.id", "--no-torch-compile"]
LINES = {"train": 1, "memory": 2, "sleep": 1, "load": 1}


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    with megatron_on_cpu(), world_of_one(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TOKENS", 64)
        patch.setattr(train, "LENGTH", 32)
        patch.setattr(train, "COPY_BYTES", 1024)
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    folder = tmp_path_factory.mktemp("benchmark")
    model = make_tiny_model(folder / "model", tie_word_embeddings=True)
    return argparse.Namespace(model=model, steps=2, flags=CPU, logs=folder, shapes=["tiny"])


@pytest.mark.parametrize("backend", megatron.VARIANTS)
@pytest.mark.parametrize("part", LINES)
def test_each_part_gives_its_columns(part: str, backend: str, options: argparse.Namespace) -> None:
    rows = megatron.measure(megatron.Job(part, "tiny", backend, "recompute"), torch.device("cpu"), options)
    assert len(rows) == LINES[part]
    for row in rows:
        assert len(megatron.NAMES) + len(row) == len(megatron.COLUMNS[part])


@pytest.mark.slow
def test_a_job_that_failed_is_named_and_those_after_the_time_are_left_out(options: argparse.Namespace) -> None:
    options = argparse.Namespace(**vars(options) | {"job_limit_s": 60.0})
    job = megatron.Job("train", "tiny", "fsdp", "no such variant")
    (row,) = megatron.rows_of(job, options.model, options, deadline=float("inf"))
    assert row[0].startswith("failed: ")
    (row,) = megatron.rows_of(job, options.model, options, deadline=0.0)
    assert row == ["not run: the time is up"]
    (row,) = megatron.rows_of(job._replace(variant="TP2"), options.model, options, deadline=float("inf"))
    assert row == ["not run: 1 GPU"]


@pytest.mark.parametrize("backend", megatron.VARIANTS)
def test_each_case_of_a_grpo_step_gives_its_columns(
    backend: str, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "PROMPT_LEN", 8)
    monkeypatch.setattr(steps, "RESPONSE_LEN", 4)
    own = {"train_backend": backend, "cases": list(steps.CASES), "shape": "tiny"}
    steps.measure(options.model, torch.device("cpu"), argparse.Namespace(**vars(options) | own))
    assert capsys.readouterr().out.count("tokens alone") == len(steps.CASES)
