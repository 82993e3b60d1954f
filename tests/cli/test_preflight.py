"""What preflight says of data and rewards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import make_tiny_model

from slime.arguments import Args, parse_args
from slime.backends.shared.checkpoint import CheckpointError
from slime.cli.dry_run import plan, training_load
from slime.cli.preflight import preflight
from slime.config import ConfigError

MakeArgs = Callable[..., Args]
ROW = {"input": "1+1=?", "label": "2"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32)


@pytest.fixture
def make_args(model: Path, tmp_path: Path) -> MakeArgs:
    """Settings for prompts of `rows`, with `flags` behind."""

    def make(rows: list[dict[str, Any]], *flags: str) -> Args:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = {
            "--train-backend": "fsdp",
            "--hf-checkpoint": str(model),
            "--prompt-data": str(tmp_path / "rows.jsonl"),
            "--rollout-batch-size": "2",
            "--n-samples-per-prompt": "2",
            "--num-rollout": "1",
            "--actor-num-gpus-per-node": "1",
            "--run-dir": str(tmp_path / "run"),
        }
        return parse_args([part for item in base.items() for part in item] + ["--colocate", *flags])

    return make


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([ROW], [], "rows.jsonl:1: no reward is chosen"),
        ([ROW], ["--rm-type", "math"], "rows.jsonl:1: the rule math compares with a label: name its key"),
        ([ROW], ["--rm-type", "boxed_exact_match"], "the rule exact_match compares with a label"),
        ([ROW], ["--rm-type", "dapo", "--label-key", "label"], "name the entry to use with --reward-key"),
        ([ROW], ["--rm-type", "remote_rm"], "give --rm-url"),
        ([ROW], ["--rm-type", "ifbench"], "rows.jsonl:1: the rule ifbench needs 'instruction_id_list' in the metadata"),
        (
            [ROW, ROW | {"metadata": {"rm_type": "maths"}}],
            ["--rm-type", "random"],
            "rows.jsonl:2: --rm-type must be",
        ),
        ([ROW, ROW | {"metadata": {"rm_type": "math"}}], ["--rm-type", "random"], "rows.jsonl:2: the rule math"),
        ([ROW, {"input": "0" * 40}], ["--rm-type", "random"], "rows.jsonl:2: the prompt has 40 tokens, the context 32"),
    ],
)
def test_a_row_that_cannot_be_scored_or_sampled_is_named(
    make_args: MakeArgs, rows: list[dict[str, Any]], flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        preflight(make_args(rows, *flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--rm-type", "dapo", "--label-key", "label", "--reward-key", "score"],
        ["--rm-type", "math", "--label-key", "label"],
        ["--rm-type", "math", "--custom-rm-path", "slime.cli.quickstart_data.exact_match"],
        ["--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout"],
    ],
)
def test_rows_that_can_be_scored_are_counted(make_args: MakeArgs, flags: list[str]) -> None:
    assert preflight(make_args([ROW, ROW], *flags)).num_prompts == 2


@pytest.mark.parametrize("flag", ["--rollout-max-prompt-len", "--rollout-max-context-len"])
def test_with_a_limit_of_the_users_own_longer_prompts_are_no_error(make_args: MakeArgs, flag: str) -> None:
    rows = [ROW, {"input": "0" * 40}]
    assert preflight(make_args(rows, "--rm-type", "random", flag, "20")).num_prompts == 2


def test_evaluation_rows_are_checked_with_their_own_key_and_context(make_args: MakeArgs, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(ROW | {"metadata": {"rm_type": "dapo"}}) + "\n" + json.dumps({"input": "0" * 40}) + "\n")
    flags = ["--rm-type", "random", "--eval-interval", "1", "--eval-prompt-data", "held", str(held)]
    with pytest.raises(ValueError, match=r"held\.jsonl:1: the rule dapo compares with a label"):
        preflight(make_args([ROW], *flags))
    with pytest.raises(ValueError, match=r"held\.jsonl:1: the rewards of the rule dapo .* --eval-reward-key"):
        preflight(make_args([ROW], *flags, "--eval-label-key", "label"))
    held.write_text(json.dumps({"input": "0" * 40}) + "\n")
    with pytest.raises(ValueError, match=r"held\.jsonl:1: .* 40 tokens, .* --eval-max-prompt-len"):
        preflight(make_args([ROW], *flags))


def test_prompts_of_a_data_source_of_the_users_own_are_unknown(make_args: MakeArgs) -> None:
    args = make_args([ROW], "--rm-type", "random", "--data-source-path", f"{__name__}.Source")
    findings = preflight(args)
    assert findings.num_prompts is None
    (data,) = [section for section in plan(args, findings) if section.title == "data"]
    assert data.rows == [("prompts", "unknown (the run itself finds them)")]


class Source:
    """A data source that preflight knows nothing of."""


@pytest.mark.parametrize(
    "flags",
    [
        ["--ref-load", "nowhere"],
        ["--advantage-estimator", "ppo", "--critic-load", "nowhere"],
        ["--advantage-estimator", "on_policy_distillation", "--opd-teacher-load", "nowhere"],
    ],
)
def test_a_model_that_is_not_there_is_named_with_its_flag(make_args: MakeArgs, flags: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{flags[-2]}: there is no directory nowhere"):
        preflight(make_args([ROW], "--rm-type", "random", *flags))


@pytest.mark.parametrize(("flags", "is_warned"), [([], True), (["--resume"], False), (["--load", "ckpt"], False)])
def test_checkpoints_that_a_run_writes_over_are_told(
    make_args: MakeArgs,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    is_warned: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("7")
    args = make_args([ROW], "--rm-type", "random", "--save", str(tmp_path / "ckpt"), *flags)
    with contextlib.suppress(CheckpointError):  # the tracker promises what is not there
        preflight(args)
    assert ("up to step 7, and this one writes over them: --resume" in caplog.text) == is_warned


@pytest.mark.parametrize(("flags", "number"), [([], 0), (["--start-rollout-id", "3", "--num-rollout", "4"], 3)])
def test_a_rollout_that_was_not_dumped_is_named_before_anything_starts(
    make_args: MakeArgs, tmp_path: Path, flags: list[str], number: int
) -> None:
    args = make_args([ROW], "--load-debug-rollout-data", str(tmp_path / "{rollout_id}.json"), *flags)
    with pytest.raises(ValueError, match=rf"there is no file .*/{number}\.json for rollout {number}"):
        preflight(args)


@pytest.mark.parametrize("flag", ["--use-routing-replay", "--use-rollout-routing-replay"])
def test_experts_of_a_dense_model_are_refused(make_args: MakeArgs, flag: str, tmp_path: Path) -> None:
    flags = ("--rm-type", "random", flag)
    with pytest.raises(ValueError, match=f"{flag}: .*config.json names no experts: the model is dense. Drop it."):
        preflight(make_args([ROW], *flags))
    moe = make_tiny_model(tmp_path / "moe", "qwen3_moe")
    assert preflight(make_args([ROW], *flags, "--hf-checkpoint", str(moe))).num_prompts == 1


def test_an_estimator_that_does_not_import_is_refused(make_args: MakeArgs) -> None:
    with pytest.raises(ValueError, match="--advantage-estimator: plug-in 'my_algo.ESTIMATOR': cannot import 'my_algo'"):
        preflight(make_args([ROW], "--rm-type", "random", "--advantage-estimator", "my_algo.ESTIMATOR"))


@pytest.mark.parametrize("path", ["nope.f", "json.nope.f", "nope", ".f"])
@pytest.mark.parametrize("flag", ["--custom-model-provider-path", "--custom-megatron-before-train-step-hook-path"])
def test_a_hook_of_megatron_whose_module_is_not_there_is_refused(make_args: MakeArgs, flag: str, path: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: {path} must be MODULE.FUNCTION, its module on PYTHONPATH"):
        preflight(make_args([ROW], "--rm-type", "random", flag, path))


def test_a_hook_of_megatron_is_found_and_not_imported(
    make_args: MakeArgs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_trainers.py").write_text("raise RuntimeError('no GPU')")
    monkeypatch.syspath_prepend(str(tmp_path))
    preflight(make_args([ROW], "--rm-type", "random", "--custom-model-provider-path", "of_trainers.provider"))


def test_the_plan_says_what_ranks_that_share_tokens_hold(make_args: MakeArgs) -> None:
    flags = ["--rm-type", "random", "--actor-num-gpus-per-node", "2"]
    plans = {}
    for size in ("1", "2"):
        args = make_args([ROW], *flags, "--context-parallel-size", size)
        plans[size] = dict(row for section in plan(args, preflight(args)) for row in section.rows)
        (memory,) = [section for section in plan(args, preflight(args)) if section.title.startswith("memory")]
        plans[size] |= dict(memory.rows)
    assert "2 share the tokens of a sample" in plans["2"]["trainers"]
    assert "share" not in plans["1"]["trainers"]
    activations = {size: rows["each trainer"].split("activations ")[1].split()[0] for size, rows in plans.items()}
    assert float(activations["2"]) == pytest.approx(float(activations["1"]) / 2, rel=0.1)
    packed = make_args(
        [ROW], *flags, "--context-parallel-size", "2", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "50"
    )
    (batches,) = [section for section in plan(packed, preflight(packed)) if section.title == "batches"]
    assert ("micro-batches", "at most 100 tokens each") in batches.rows


def test_the_plan_says_where_the_critic_is(make_args: MakeArgs) -> None:
    args = make_args([ROW], "--rm-type", "random", "--advantage-estimator", "ppo")
    rows = [row for section in plan(args, preflight(args)) for row in section.rows]
    assert ("critic", "1, in the trainers' slots") in rows
    assert any("critic" in text for name, text in rows if name == "each trainer")


def test_the_plan_names_every_model_that_is_served(make_args: MakeArgs, model: Path, tmp_path: Path) -> None:
    group = {"worker_type": "regular", "num_gpus": 1}
    models = [
        {"name": "student", "server_groups": [group]},
        {"name": "judge", "model_path": str(model), "update_weights": False, "server_groups": [group]},
    ]
    (tmp_path / "engines.yaml").write_text(json.dumps({"sglang": models}))
    flags = ["--sglang-config", str(tmp_path / "engines.yaml"), "--actor-num-gpus-per-node", "2"]
    args = make_args([ROW], "--rm-type", "random", *flags)
    rows = dict(row for section in plan(args, preflight(args)) for row in section.rows)
    assert rows["engines of student"] == "1 x 1, auto, in the trainers' slots, in turns"
    assert rows["engines of judge"] == f"1 x 1, auto, in the trainers' slots, in turns, weights of {model}"
    assert rows["router"] == "sglang-router, on a free port, for each model"
    assert rows["each engine slot of judge"].startswith("weights ")


def test_the_plan_compares_with_the_gpu_that_there_is(make_args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make_args([ROW], "--rm-type", "random", "--device", "cuda")
    monkeypatch.setattr("slime.cli.dry_run.gpu_bytes", lambda: 2**31)
    rows = dict(row for section in plan(args, preflight(args)) for row in section.rows)
    assert rows["a GPU of this machine"] == "2.00 GiB, 0% of it at a trainer's peak"


def test_the_plan_tells_memory_awake_and_asleep(make_args: MakeArgs) -> None:
    args = make_args([ROW], "--rm-type", "random", "--device", "cuda", "--gradient-checkpointing")
    rows = dict(row for section in plan(args, preflight(args)) for row in section.rows)
    assert " at its peak: weights and Adam " in rows["each trainer"]
    assert rows["each trainer asleep"].endswith("page-locked, on the host")
    assert "two buckets" in rows["while weights are sent"]
    disaggregated = make_args([ROW], "--rm-type", "random", "--no-colocate", "--rollout-num-gpus", "1")
    names = {name for section in plan(disaggregated, preflight(disaggregated)) for name, _ in section.rows}
    assert not {"each trainer asleep", "while weights are sent"} & names


def test_the_plan_of_megatron_says_who_shares_what_and_how_weights_travel(make_args: MakeArgs) -> None:
    args = make_args([ROW], "--rm-type", "random", "--device", "cuda", "--use-kl-loss", "--kl-loss-coef", "0.1")
    shared = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}
    megatron = replace(args, train_backend="megatron", actor_num_gpus_per_node=8, sequence_parallel=True, **shared)
    rows = dict(row for section in plan(megatron, preflight(megatron)) for row in section.rows)
    expected = "tensor 2, sequence too; pipeline 2 (1 + 1 layers); context 1; data 2 (and the optimizer's state)"
    assert rows["parallel"] == expected
    assert rows["weights travel by"] == "disk"  # to the embedded engine
    for kind in ("weights", "gradients", "optimizer", "activations"):
        assert f"{kind} " in rows["each trainer"]
    assert rows["frozen models"].endswith("a trainer, page-locked, on the host")
    assert "two buckets" in rows["while weights are sent"]


def test_what_a_rank_holds_follows_from_the_settings(make_args: MakeArgs) -> None:
    on_gpu = training_load(
        make_args([ROW], "--device", "cuda", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "90")
    )
    assert (on_gpu.compute_bytes, on_gpu.is_compiled, on_gpu.micro_batch_tokens, on_gpu.accumulates) == (
        2,
        True,
        90,
        True,
    )
    on_cpu = training_load(make_args([ROW], "--device", "cpu", "--micro-batch-size", "4"))
    assert (on_cpu.compute_bytes, on_cpu.is_compiled, on_cpu.micro_batch_tokens) == (4, False, 4 * 32)
    assert not on_cpu.accumulates, "the 4 samples of a step are one micro-batch"
