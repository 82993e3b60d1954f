"""Models of transformers whose routers follow known experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_families import write_tiny_model
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, make_recipe, random_batch, settings_for

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, TokenOutputs, Wants

STEADY = {"adam_eps": 1e-4, "lr": 1e-3}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe")


def loaded(directory: Path, **settings: Any) -> FSDPBackend:
    backend = make_backend(settings_for(directory, **{"use_routing_replay": True} | STEADY | settings))
    backend.load()
    return backend


def one_batch(**options: Any) -> PackedBatch:
    batch = random_batch(**options)
    return pack_rows(batch, range(len(batch)), batch.loss_mask / batch.loss_mask.sum())


def likelihood(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
    loss = -(batch.loss_weights * outputs.log_probs).sum()
    return LossOutput(loss, {"log_probs_now": (batch.loss_weights * outputs.log_probs).sum().detach()})


def routers_moved(backend: FSDPBackend) -> None:
    """Other weights of the routers alone."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in backend.models["actor"].named_parameters():
            if name.endswith("mlp.gate.weight"):
                local = parameter.to_local()  # type: ignore[attr-defined]
                local += 0.3 * torch.randn(local.shape, generator=generator)


def log_probs(backend: FSDPBackend, batch: PackedBatch) -> torch.Tensor:
    return backend.log_probs([batch], "actor", entropy=False)[0].log_probs


def test_with_the_same_weights_replay_changes_nothing(moe: Path) -> None:
    batch, plain = one_batch(), loaded(moe, use_routing_replay=False)
    expected = log_probs(plain, one_batch())
    ours = loaded(moe)
    recorded = log_probs(ours, batch)
    experts = batch.routed_experts
    assert experts is not None and experts.shape == (len(batch.input_ids), 2, 2)
    torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_probs(ours, batch), expected, rtol=0, atol=1e-6)
    result = ours.train_step([batch], likelihood, wants=Wants())
    theirs = plain.train_step([one_batch()], likelihood, wants=Wants())
    assert result.metrics.pop("routing_replay_mismatch") == 0
    assert result.metrics == pytest.approx(theirs.metrics, abs=1e-6)
    assert result.grad_norm == pytest.approx(theirs.grad_norm, abs=1e-6)


def test_after_a_change_of_weights_log_probs_are_those_of_the_old_experts(moe: Path) -> None:
    ours, old, own = loaded(moe, share_prompts=False), one_batch(), one_batch()
    log_probs(ours, old)
    assert old.routed_experts is not None
    recorded = old.routed_experts.clone()
    routers_moved(ours)
    now = log_probs(ours, own)
    assert own.routed_experts is not None
    assert not own.routed_experts.equal(recorded), "without replay experts are others"
    replayed = log_probs(ours, old)
    assert old.routed_experts.equal(recorded)
    assert (replayed - now).abs().max() > 1e-3
    share = 1 - (recorded[:, :, :, None] == own.routed_experts[:, :, None, :]).any(3).float().mean().item()
    step = ours.train_step([old], likelihood, wants=Wants())
    # The second layer's router sees what the first layer's old experts made of a token: about, not exactly, the share.
    assert step.metrics["routing_replay_mismatch"] == pytest.approx(share, abs=0.1)
    weights = old.loss_weights
    assert step.metrics["log_probs_now"] == pytest.approx((weights * replayed).sum().item(), abs=1e-6)


def test_gradients_reach_the_routers_through_replayed_experts(moe: Path) -> None:
    before, batch, ours = load_gates(moe), one_batch(), loaded(moe)
    log_probs(ours, batch)
    routers_moved(ours)
    moved = {name: tensor.clone() for name, tensor in full_weights(ours).items() if name in before}
    ours.train_step([batch], likelihood, wants=Wants())
    after = full_weights(ours)
    assert len(moved) == 2
    assert all((after[name] - tensor).abs().max() > 1e-5 for name, tensor in moved.items())


def load_gates(directory: Path) -> set[str]:
    return {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}


COMPILED = {"torch_compile": True, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": True}, {"share_prompts": False}, pytest.param(COMPILED, marks=pytest.mark.slow)],
)
def test_replay_with_recomputation_compiled_or_without_shared_prompts_trains_alike(moe: Path, settings: Any) -> None:
    found = []
    for changes in ({}, settings):
        batches, ours = [one_batch(seed=1), one_batch(seed=2)], loaded(moe, **changes)
        for batch in batches:
            log_probs(ours, batch)
        routers_moved(ours)
        step = ours.train_step(batches, likelihood, wants=Wants())
        found.append((step, full_weights(ours)))
    (step, weights), (other_step, others) = found
    assert step.metrics["routing_replay_mismatch"] > 0
    assert other_step.grad_norm == pytest.approx(step.grad_norm, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_without_known_experts_the_backward_computes_those_of_its_forward_again(moe: Path) -> None:
    plain, ours = (loaded(moe, gradient_checkpointing=checked) for checked in (False, True))
    steps = [backend.train_step([one_batch()], likelihood, wants=Wants()) for backend in (plain, ours)]
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, abs=1e-6)
    assert steps[1].metrics["routing_replay_mismatch"] == 0


def test_the_reference_is_on_its_own(moe: Path) -> None:
    ours = loaded(moe, use_kl_loss=True)
    batch = one_batch()
    ours.log_probs([batch], "ref", entropy=False)
    assert batch.routed_experts is None


def test_routers_that_score_by_sigmoids_replay_too(tmp_path: Path) -> None:
    write_tiny_model("glm4_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    batch, ours = one_batch(vocab_size=64), loaded(tmp_path, share_prompts=False)
    first = log_probs(ours, batch)
    assert batch.routed_experts is not None
    dense = config["first_k_dense_replace"]
    assert (batch.routed_experts[:, :dense] == -1).all() and (batch.routed_experts[:, dense:] >= 0).all()
    torch.testing.assert_close(log_probs(ours, batch), first, rtol=0, atol=1e-6)
    expected = log_probs(loaded(tmp_path, use_routing_replay=False), one_batch(vocab_size=64))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)


def test_a_dense_model_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no routers of experts"):
        loaded(model)


def test_a_recipe_of_several_steps_replays_and_says_how_much(moe: Path, tmp_path: Path) -> None:
    args = settings_for(moe, use_routing_replay=True, num_steps_per_rollout=2, lr=3e-2)
    backend = make_backend(args)
    backend.load()
    metrics = make_recipe(backend, args, tmp_path).train(0, random_batch())
    assert 0 < metrics["train/routing_replay_mismatch"] < 0.5


def test_without_the_engines_experts_their_replay_is_refused(moe: Path, tmp_path: Path) -> None:
    args = settings_for(moe, use_rollout_routing_replay=True)
    backend = make_backend(args)
    backend.load()
    with pytest.raises(ValueError, match="samples without rollout_routed_experts"):
        make_recipe(backend, args, tmp_path).train(0, random_batch())
