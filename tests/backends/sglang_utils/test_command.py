"""The command line of SGLang that follows from the settings of a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from slime.backends.sglang_utils.arguments import value_of
from slime.backends.sglang_utils.command import sglang_commands
from slime.config.run import RunConfig
from slime.engine.spec import EngineCommand, EngineSpec

SPEC = EngineSpec(index=3, model_path="/model", weight_version="7", num_threads=5, device="cuda", num_slots=4)


def command(spec: EngineSpec = SPEC, **settings: Any) -> EngineCommand:
    """The command of an engine's first node."""
    return sglang_commands(RunConfig(**settings), spec)[0]


def test_an_engine_is_told_what_slime_knows_and_then_what_the_user_said() -> None:
    argv, _ = command(rollout_seed=10, sglang_args=["--mem-fraction-static", "0.8"])
    assert argv[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert argv[-2:] == ["--mem-fraction-static", "0.8"]
    given = {flag: value_of(argv, flag) for flag in ("--model-path", "--weight-version", "--tp-size", "--random-seed")}
    assert given == {"--model-path": "/model", "--weight-version": "7", "--tp-size": "4", "--random-seed": "13"}
    assert (value_of(argv, "--host"), value_of(argv, "--port")) == ("{host}", "{port}")
    absent = {"--api-key", "--trust-remote-code", "--enable-memory-saver", "--nnodes", "--device"}
    assert absent.isdisjoint(argv)


def test_engines_that_sleep_on_a_gpu_can_release_memory() -> None:
    assert "--enable-memory-saver" in command(offload_rollout=True).argv
    on_cpu = command(replace(SPEC, device="cpu"), offload_rollout=True)
    assert "--enable-memory-saver" not in on_cpu.argv
    assert value_of(on_cpu.argv, "--device") == "cpu"
    assert on_cpu.env["OMP_NUM_THREADS"] == "5"


def test_a_frozen_engine_that_sleeps_keeps_its_weights_and_its_own_context() -> None:
    argv = command(replace(SPEC, is_frozen=True), offload_rollout=True, rollout_max_context_len=64).argv
    assert {"--enable-memory-saver", "--enable-weights-cpu-backup"} <= set(argv)
    assert "--context-length" not in argv
    assert "--enable-weights-cpu-backup" not in command(offload_rollout=True).argv


def test_what_a_group_overrides_wins_over_what_all_engines_are_told() -> None:
    overrides = {"mem_fraction_static": 0.8, "disable_radix_cache": False, "pp_size": 2, "json": {"a": 1}}
    given = ["--mem-fraction-static=0.5", "--disable-radix-cache", "--cuda-graph-bs", "1", "2"]
    argv = command(replace(SPEC, overrides=overrides), sglang_args=given).argv
    wanted = ["--cuda-graph-bs", "1", "2", "--mem-fraction-static", "0.8", "--pp-size", "2", "--json", '{"a": 1}']
    assert argv[-len(wanted) :] == wanted
    assert "--disable-radix-cache" not in argv
    assert value_of(argv, "--tp-size") == "2"


def test_the_nodes_of_an_engine_differ_in_their_rank_alone() -> None:
    config = RunConfig()
    first, second = (each.argv for each in sglang_commands(config, replace(SPEC, num_slots=16, num_nodes=2)))
    assert value_of(first, "--tp-size") == "16"
    assert (value_of(first, "--nnodes"), value_of(first, "--dist-init-addr")) == ("2", "{head}")
    at = first.index("--node-rank") + 1
    assert (first[at], second[at]) == ("0", "1")
    assert first[:at] + first[at + 1 :] == second[:at] + second[at + 1 :]


def test_another_python_does_not_see_our_packages() -> None:
    assert command(sglang_python="/opt/sglang/bin/python").env["PYTHONPATH"] == ""
    assert "PYTHONPATH" not in command().env


def test_the_whole_context_of_a_run_can_be_used_also_beyond_the_models() -> None:
    argv, env = command(rollout_max_context_len=64, sglang_args=["--context-length", "64"])
    assert value_of(argv, "--context-length") == "72"
    assert env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] == "1"
    assert "--context-length" not in command().argv


def test_a_key_reaches_the_engine() -> None:
    assert value_of(command(sglang_api_key="secret").argv, "--api-key") == "secret"


def test_engines_that_share_the_work_are_told_their_part() -> None:
    prefill = command(replace(SPEC, role="prefill", bootstrap_port=9001)).argv
    decode = command(replace(SPEC, role="decode")).argv
    assert value_of(prefill, "--disaggregation-mode") == "prefill"
    assert value_of(prefill, "--disaggregation-bootstrap-port") == "9001"
    assert value_of(decode, "--disaggregation-mode") == "decode"
    assert "--disaggregation-bootstrap-port" not in decode
    assert "--disaggregation-mode" not in command().argv


def test_engines_of_the_policy_tell_of_experts_where_these_are_replayed() -> None:
    flag = "--enable-return-routed-experts"
    assert flag in command(use_rollout_routing_replay=True).argv
    assert flag not in command(replace(SPEC, is_frozen=True), use_rollout_routing_replay=True).argv
    assert flag not in command(use_routing_replay=True).argv
