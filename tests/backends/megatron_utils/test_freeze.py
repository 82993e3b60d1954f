"""Parameters that are not trained, beside FSDP in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import STEADY, Run, make_megatron, two_rollouts
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, run_ranks, settings_for

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LOWER_HALF = {"freeze_params_name_list": [r"embed_tokens", r"layers\.0\."]}


def assert_equal_runs(found: Run, expected: Run) -> None:
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    for name, tensor in found.weights.items():
        torch.testing.assert_close(tensor, expected.weights[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("settings", "parallel"),
    [
        (LOWER_HALF, {}),
        (LOWER_HALF, FULL),
        ({"freeze_params_name_list": ["embed_tokens"]}, {"recompute_granularity": "selective"}),
        ({"only_train_params_name_list": [r"layers\.1\.self_attn\.(q|k|v)_proj", "lm_head"]}, {}),
        ({"only_train_params_name_list": ["mlp", "norm"]}, {"use_distributed_optimizer": True}),
    ],
)
def test_what_is_frozen_stays_and_the_rest_is_trained_as_with_fsdp(
    settings: dict[str, Any], parallel: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    args = settings_for(model, **STEADY | settings)
    theirs, ours = make_backend(args), make_megatron(args, **parallel)
    theirs.load(), ours.load()
    before = full_weights(ours)  # type: ignore[arg-type]
    expected, found = two_rollouts(theirs, args, tmp_path), two_rollouts(ours, args, tmp_path)
    assert_equal_runs(found, expected)
    named = dict(theirs.models["actor"].lm.named_parameters())
    moved = {name for name, tensor in found.weights.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, parameter in named.items() if parameter.requires_grad}


def test_experts_are_trained_together_as_with_fsdp_or_by_their_number(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "moe", "qwen3_moe")
    args = settings_for(model, only_train_params_name_list=[r"layers\.1\.mlp\.experts\."], **STEADY)
    theirs, ours = make_backend(args), make_megatron(args)
    theirs.load(), ours.load()
    expected, found = two_rollouts(theirs, args, tmp_path), two_rollouts(ours, args, tmp_path)
    assert_equal_runs(found, expected)

    one = make_megatron(dataclasses.replace(args, only_train_params_name_list=[r"layers\.1\.mlp\.experts\.2\."]))
    one.load()
    before = full_weights(one)  # type: ignore[arg-type]
    after = two_rollouts(one, args, tmp_path).weights
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_frozen_parameters_have_neither_gradients_nor_optimizer_state(model: Path, tmp_path: Path) -> None:
    from slime.backends.megatron_utils.optimizer import gradient_buffers, state_tensors

    args = settings_for(model, **STEADY | LOWER_HALF)
    backend: Any = make_megatron(args, use_distributed_optimizer=True)
    backend.load()
    two_rollouts(backend, args, tmp_path)
    weights = backend.chunk.weights()
    trained = sum(tensor.numel() for name, tensor in weights.items() if "layers.1" in name or "output" in name)
    trained += weights["decoder.final_layernorm.weight"].numel()
    assert 0 < trained < sum(tensor.numel() for tensor in weights.values()) / 1.5
    padding = 2 * 64 * len(weights)  # Megatron aligns what ranks share
    assert trained <= sum(buffer.numel() for buffer in gradient_buffers(backend.chunk.wrapped)) < trained + padding
    states = sum(tensor.numel() for tensor in state_tensors(backend.optimizer))
    assert 3 * trained <= states < 3 * (trained + padding)


def test_a_checkpoint_of_a_run_with_frozen_parameters_goes_on(model: Path, tmp_path: Path) -> None:
    args = settings_for(model, save=str(tmp_path / "save"), **STEADY | LOWER_HALF)
    backend = make_megatron(args)
    backend.load()
    two_rollouts(backend, args, tmp_path)
    backend.save(1)
    again = make_megatron(dataclasses.replace(args, load=args.save))
    assert again.load() == 2
    runs = [two_rollouts(candidate, args, tmp_path) for candidate in (backend, again)]
    assert runs[0].metrics == runs[1].metrics
    assert all(torch.equal(tensor, runs[1].weights[name]) for name, tensor in runs[0].weights.items())


def test_patterns_may_be_of_megatrons_names_and_tell_parts_of_one_parameter_apart_not(model: Path) -> None:
    hf, own = (["q_proj", "k_proj", "v_proj", "norm"], ["linear_qkv", "layernorm"])
    found = []
    for patterns in (hf, own):
        backend: Any = make_megatron(settings_for(model, freeze_params_name_list=patterns))
        backend.load()
        found.append({name for name, value in backend.chunk.lms[0].named_parameters() if not value.requires_grad})
    assert found[0] - found[1] == found[1] - found[0] == set() < found[0]
    for patterns, message in (
        (["q_proj"], "--freeze-params-name-list q_proj matches .*q_proj.weight but not .*k_proj.weight: both are in"),
        (["attn.query"], "--freeze-params-name-list attn.query matches none of embedding.word_embeddings.weight, "),
        (["."], "leaves no parameter to train"),
    ):
        with pytest.raises(ValueError, match=message):
            make_megatron(settings_for(model, freeze_params_name_list=patterns)).load()


# --- two ranks

TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
LOWER_STAGE = {"freeze_params_name_list": ["embed_tokens", r"layers\.[01]\."]}
UPPER_STAGE = {"only_train_params_name_list": LOWER_STAGE["freeze_params_name_list"]}
TWO_RANKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "first_stage": (LOWER_STAGE, PIPELINE),
    "last_stage": (UPPER_STAGE, PIPELINE | FULL),
    "tied": ({"freeze_params_name_list": ["embed_tokens"]}, PIPELINE | {"use_distributed_optimizer": True}),
    "matrices": (LOWER_HALF, TENSOR | FULL),
    "half": (LOWER_STAGE | {"bf16": True}, PIPELINE),
}


def run_one(layout: str, model: Path, work: Path) -> None:
    """Two rollouts; then two more, uninterrupted and from a checkpoint."""
    settings, parallel = TWO_RANKS[layout]
    args = settings_for(model, save=str(work / layout), **STEADY | settings)
    backend = make_megatron(args, **parallel)
    backend.load()
    runs = [two_rollouts(backend, args, work)]
    backend.save(1)
    again = make_megatron(dataclasses.replace(args, load=args.save), **parallel)
    assert again.load() == 2
    runs += [two_rollouts(each, args, work) for each in (backend, again)]
    if dist.get_rank() == 0:
        torch.save([tuple(run) for run in runs], work / f"{layout}.pt")


def two_ranks_body(model: Path, tied: Path, work: Path) -> None:
    with megatron_on_cpu():
        for layout in TWO_RANKS:
            run_one(layout, tied if layout == "tied" else model, work)


@pytest.mark.slow
def test_ranks_may_hold_frozen_parameters_alone(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=4)
    tied = make_tiny_model(tmp_path / "tied", num_hidden_layers=4, tie_word_embeddings=True)
    run_ranks(two_ranks_body, 2, model, tied, tmp_path, store=tmp_path / "store")
    for layout, (settings, _) in TWO_RANKS.items():
        first, uninterrupted, continued = (Run(*run) for run in torch.load(tmp_path / f"{layout}.pt"))
        assert_equal_runs(continued, uninterrupted)
        if "bf16" not in settings:
            args = settings_for(tied if layout == "tied" else model, **STEADY | settings)
            theirs = make_backend(args)
            theirs.load()
            assert_equal_runs(first, two_rollouts(theirs, args, tmp_path))
