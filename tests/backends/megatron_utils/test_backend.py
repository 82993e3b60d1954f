"""One process of Megatron beside one of FSDP: the same weights and samples, in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_training import STEADY, make_megatron, two_critic_rollouts, two_rollouts
from helpers.model_families import CONFIGS, write_tiny_model
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, make_recipe, random_batch, settings_for

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.data.packed import pack_rows


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("qwen3", {}),
        ("qwen2", {"kl_coef": 0.2, "tie": True}),
        ("llama", {"rollout_temperature": 0.7, "num_steps_per_rollout": 2, "entropy_coef": 0.1}),
        ("glm4", {}),
        ("qwen3_moe", {}),
        ("qwen2", {"weight_decay": 0.5, "num_steps_per_rollout": 2}),  # of matrices alone
        ("qwen2", {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 5.0}),
        ("qwen3_moe", {"reset_optimizer_states": True, "num_steps_per_rollout": 2}),
    ],
)
def test_megatron_trains_as_fsdp(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tie = settings.pop("tie", False)
    model = make_tiny_model(tmp_path / "model", architecture, tie_word_embeddings=tie)
    args = settings_for(model, **STEADY | settings)
    theirs, ours = make_backend(args), make_megatron(args)
    assert theirs.load() == ours.load() == 0
    expected, found = two_rollouts(theirs, args, tmp_path), two_rollouts(ours, args, tmp_path)
    for ours_of_rollout, theirs_of_rollout in zip(found.metrics, expected.metrics, strict=True):
        assert ours_of_rollout == pytest.approx(theirs_of_rollout, abs=1e-5, rel=1e-5)
    assert_close(found.weights, expected.weights)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("deepseek_v3", {}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        ("glm4_moe", {}),
    ],
)
def test_experts_chosen_by_sigmoid_and_latent_attention_train_as_with_fsdp(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    write_tiny_model(family, tmp_path / "model", vocab_size=320, initializer_range=0.2, **fields)
    args = settings_for(tmp_path / "model", **STEADY)
    theirs, ours = make_backend(args), make_megatron(args)
    assert theirs.load() == ours.load() == 0
    expected, found = two_rollouts(theirs, args, tmp_path), two_rollouts(ours, args, tmp_path)
    for ours_of_rollout, theirs_of_rollout in zip(found.metrics, expected.metrics, strict=True):
        assert ours_of_rollout == pytest.approx(theirs_of_rollout, abs=1e-5, rel=1e-5)
    assert_close(found.weights, expected.weights)


@pytest.mark.parametrize(
    "parallel",
    [
        {"use_distributed_optimizer": True},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj", "core_attn"]},
    ],
)
def test_what_saves_memory_changes_nothing(parallel: dict[str, Any], tmp_path: Path) -> None:
    write_tiny_model("deepseek_v3", tmp_path / "model", vocab_size=320, initializer_range=0.2)
    args = settings_for(tmp_path / "model", **STEADY)
    runs = []
    for settings in ({}, parallel):
        backend = make_megatron(args, **settings)
        backend.load()
        runs.append(two_rollouts(backend, args, tmp_path))
    assert_close(runs[1].weights, runs[0].weights)


def test_sgd_goes_down_the_gradient_and_on_from_a_checkpoint(model: Path, tmp_path: Path) -> None:
    args = settings_for(model, optimizer="sgd", lr=0.01, clip_grad=0.0, save=str(tmp_path / "save"), num_rollout=20)
    backend = make_megatron(args)
    backend.load()
    before = full_weights(backend)  # type: ignore[arg-type]
    recipe = make_recipe(backend, args, tmp_path)  # type: ignore[arg-type]
    metrics = recipe.train(0, random_batch(seed=0))
    after = full_weights(backend)  # type: ignore[arg-type]
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
    assert moved / 0.01 == pytest.approx(metrics["train/grad_norm"], rel=1e-3)
    backend.save(0)
    again = make_megatron(dataclasses.replace(args, load=args.save))
    assert again.load() == 1
    runs = [two_rollouts(candidate, args, tmp_path) for candidate in (backend, again)]
    assert runs[0].metrics == runs[1].metrics
    assert all(torch.equal(tensor, runs[1].weights[name]) for name, tensor in runs[0].weights.items())


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "glm4_moe"])
def test_packed_sequences_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    write_tiny_model(family, tmp_path, vocab_size=320, initializer_range=0.2)
    backend = make_megatron(settings_for(tmp_path))
    backend.load()
    batch = random_batch(seed=3)
    weights = torch.ones(int(batch.response_lengths.sum())).numpy()
    together = backend.log_probs([pack_rows(batch, range(len(batch)), weights)], "actor", entropy=True)[0]
    alone = backend.log_probs([pack_rows(batch, [row], weights) for row in range(len(batch))], "actor", entropy=True)
    torch.testing.assert_close(together.log_probs, torch.cat([one.log_probs for one in alone]), rtol=0, atol=2e-6)
    entropies = [one.entropy for one in alone if one.entropy is not None]
    torch.testing.assert_close(together.entropy, torch.cat(entropies), rtol=0, atol=2e-6)


def test_weights_leave_as_they_came(model: Path) -> None:
    args = settings_for(model)
    theirs, ours = make_backend(args), make_megatron(args)
    theirs.load(), ours.load()
    expected, found = full_weights(theirs), full_weights(ours)  # type: ignore[arg-type]
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_critic_learns_as_with_fsdp_and_goes_on_from_its_checkpoint(model: Path, tmp_path: Path) -> None:
    settings = {"advantage_estimator": "ppo", "num_steps_per_rollout": 2, **STEADY}
    args = settings_for(model, **settings)
    theirs = FSDPBackend(args, args, torch.device("cpu"), role="critic")
    ours = make_megatron(dataclasses.replace(args, save=str(tmp_path)), role="critic")
    assert theirs.load() == ours.load() == 0
    (expected, values), (found, own_values) = (two_critic_rollouts(backend, args) for backend in (theirs, ours))
    for ours_of_rollout, theirs_of_rollout in zip(found, expected, strict=True):
        assert ours_of_rollout == pytest.approx(theirs_of_rollout, abs=1e-5, rel=1e-5)
    assert own_values[1].abs().max() > 1e-3
    torch.testing.assert_close(own_values, values, rtol=0, atol=1e-5)

    ours.save(1)
    resumed = make_megatron(dataclasses.replace(args, load=str(tmp_path)), role="critic")
    assert resumed.load() == 2
    again = [two_critic_rollouts(backend, args) for backend in (ours, resumed)]
    assert again[0][0] == again[1][0]
    assert all(torch.equal(one, other) for one, other in zip(again[0][1], again[1][1], strict=True))
    actor = make_megatron(dataclasses.replace(args, save=str(tmp_path / "actor")))
    actor.load(), actor.save(0)
    with pytest.raises(ValueError, match="is no critic"):
        make_megatron(dataclasses.replace(args, critic_load=str(tmp_path / "actor")), role="critic").load()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_the_log_probs_of_transformers(family: str, tmp_path: Path) -> None:
    write_tiny_model(family, tmp_path)
    args = settings_for(tmp_path)
    batch = random_batch(seed=5, vocab_size=64)
    weights = torch.ones(int(batch.response_lengths.sum())).numpy()
    packed = pack_rows(batch, range(len(batch)), weights)
    found = []
    for backend in (make_backend(args), make_megatron(args)):
        backend.load()
        found.append(backend.log_probs([packed], "actor", entropy=False)[0].log_probs)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-5)


def test_corrections_of_routers_keep_their_precision_in_half_precision(tmp_path: Path) -> None:
    """Loaded, wrapped, used and exported."""
    hf = write_tiny_model("deepseek_v3", tmp_path / "model", dtype=torch.bfloat16, vocab_size=320)
    expected = {name: buffer for name, buffer in hf.state_dict().items() if name.endswith("e_score_correction_bias")}
    assert expected and not any(torch.equal(value, value.bfloat16().float()) for value in expected.values())
    args = settings_for(tmp_path / "model", bf16=True)
    theirs, ours = make_backend(args), make_megatron(args)
    for backend in (theirs, ours):
        backend.load()
        make_recipe(backend, args, tmp_path).train(0, random_batch())  # type: ignore[arg-type]
        found = full_weights(backend)  # type: ignore[arg-type]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert {tensor.dtype for name, tensor in found.items() if name not in expected} == {torch.bfloat16}


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_corrections_of_routers_move_at_the_rate_that_megatron_is_given(rate: float, tmp_path: Path) -> None:
    """By default they stay: the loss of reinforcement learning is the only one."""
    write_tiny_model("deepseek_v3", tmp_path / "model", vocab_size=320)
    args = settings_for(tmp_path / "model")
    backend = make_megatron(args, **({"megatron_args": {"moe_router_bias_update_rate": rate}} if rate else {}))
    backend.load()
    before = full_weights(backend)  # type: ignore[arg-type]
    make_recipe(backend, args, tmp_path).train(0, random_batch())  # type: ignore[arg-type]
    after = full_weights(backend)  # type: ignore[arg-type]
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    moved = torch.stack([(after[name] - before[name]).abs() for name in names])
    assert len(names) == 3
    assert moved.max() == pytest.approx(rate, abs=1e-7)
