"""The command line of SGLang that follows from the settings of a run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime.backends.sglang_utils.arguments import value_of
from slime.backends.sglang_utils.command import sglang_commands
from slime.config.run import RunConfig
from slime.engine.spec import EngineCommand, EngineSpec

SPEC = EngineSpec(index=3, model_path="/model", weight_version="7", num_threads=5, device="cuda", num_slots=4)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A folder whose model was made for 64 positions."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    return str(tmp_path)


def command(checkpoint: str, spec: EngineSpec = SPEC, **settings: Any) -> EngineCommand:
    """The command of an engine's first node."""
    return sglang_commands(RunConfig(hf_checkpoint=checkpoint, **settings), spec)[0]


def test_an_engine_is_told_what_slime_knows_and_then_what_the_user_said(checkpoint: str) -> None:
    argv, _ = command(checkpoint, rollout_seed=10, sglang_args=["--mem-fraction-static", "0.8"])
    assert argv[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert argv[-2:] == ["--mem-fraction-static", "0.8"]
    given = {flag: value_of(argv, flag) for flag in ("--model-path", "--weight-version", "--tp-size", "--random-seed")}
    assert given == {"--model-path": "/model", "--weight-version": "7", "--tp-size": "4", "--random-seed": "13"}
    assert (value_of(argv, "--host"), value_of(argv, "--port")) == ("{host}", "{port}")
    absent = {"--api-key", "--trust-remote-code", "--enable-memory-saver", "--nnodes", "--device"}
    assert absent.isdisjoint(argv)


def test_engines_that_sleep_on_a_gpu_can_release_memory(checkpoint: str) -> None:
    assert "--enable-memory-saver" in command(checkpoint, offload_rollout=True).argv
    on_cpu = command(checkpoint, replace(SPEC, device="cpu"), offload_rollout=True)
    assert "--enable-memory-saver" not in on_cpu.argv
    assert value_of(on_cpu.argv, "--device") == "cpu"
    assert on_cpu.env["OMP_NUM_THREADS"] == "5"


def test_the_nodes_of_an_engine_differ_in_their_rank_alone(checkpoint: str) -> None:
    config = RunConfig(hf_checkpoint=checkpoint)
    first, second = (each.argv for each in sglang_commands(config, replace(SPEC, num_slots=16, num_nodes=2)))
    assert value_of(first, "--tp-size") == "16"
    assert (value_of(first, "--nnodes"), value_of(first, "--dist-init-addr")) == ("2", "{head}")
    at = first.index("--node-rank") + 1
    assert (first[at], second[at]) == ("0", "1")
    assert first[:at] + first[at + 1 :] == second[:at] + second[at + 1 :]


def test_another_python_does_not_see_our_packages(checkpoint: str) -> None:
    assert command(checkpoint, sglang_python="/opt/sglang/bin/python").env["PYTHONPATH"] == ""
    assert "PYTHONPATH" not in command(checkpoint).env


@pytest.mark.parametrize(("length", "is_allowed"), [("64", False), ("65", True)])
def test_a_context_beyond_the_models_is_allowed_on_demand_alone(checkpoint: str, length: str, is_allowed: bool) -> None:
    env = command(checkpoint, sglang_args=["--context-length", length]).env
    assert ("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN" in env) is is_allowed


def test_a_key_reaches_the_engine(checkpoint: str) -> None:
    assert value_of(command(checkpoint, sglang_api_key="secret").argv, "--api-key") == "secret"
