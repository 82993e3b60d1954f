"""Megatron's routers follow known experts, as those of FSDP do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import make_megatron
from helpers.model_families import write_tiny_model
from helpers.routed import NUM_LAYERS, routed_batch, routed_rollouts
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, run_ranks, settings_for

from slime.arguments import Args
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import TrainBackend

SEVERAL_STEPS = {"num_steps_per_rollout": 2, "lr": 1e-2, "adam_eps": 1e-3}
ROLLOUT, OWN = {"use_rollout_routing_replay": True}, {"use_routing_replay": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "context": {"context_parallel_size": 2},
    "experts": {"expert_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "recomputed_virtual_stages": {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=NUM_LAYERS)


def loaded(backend: TrainBackend) -> TrainBackend:
    backend.load()
    return backend


def one_batch(*, with_experts: bool = True, **options: Any) -> PackedBatch:
    batch = routed_batch(**options)
    packed = pack_rows(batch, range(len(batch)), batch.loss_mask / batch.loss_mask.sum())
    packed.routed_experts = packed.routed_experts if with_experts else None
    return packed


def assert_alike(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert all(metrics["train/routing_replay_mismatch"] > 0 for metrics in theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("replay", [ROLLOUT, OWN])
def test_megatron_replays_as_fsdp(replay: dict[str, Any], moe: Path, tmp_path: Path) -> None:
    args = settings_for(moe, share_prompts=False, **SEVERAL_STEPS | replay)
    theirs, ours = loaded(make_backend(args)), loaded(make_megatron(args))
    assert_alike(routed_rollouts(ours, args, tmp_path), routed_rollouts(theirs, args, tmp_path))
    expected = full_weights(theirs)  # type: ignore[arg-type]
    for name, tensor in full_weights(ours).items():  # type: ignore[arg-type]
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)


def test_what_megatron_records_are_the_experts_of_fsdp_and_followed_they_change_nothing(moe: Path) -> None:
    args = settings_for(moe, share_prompts=False, **OWN)
    theirs, ours = loaded(make_backend(args)), loaded(make_megatron(args))
    expected, found = one_batch(with_experts=False), one_batch(with_experts=False)
    theirs.log_probs([expected], "actor", entropy=False)
    first = ours.log_probs([found], "actor", entropy=False)[0].log_probs
    assert expected.routed_experts is not None and found.routed_experts is not None
    assert torch.equal(found.routed_experts.sort().values, expected.routed_experts.sort().values)
    again = ours.log_probs([found], "actor", entropy=False)[0].log_probs
    torch.testing.assert_close(again, first, rtol=0, atol=1e-6)


def test_the_engines_experts_are_followed_where_they_are_known(moe: Path) -> None:
    ours = loaded(make_megatron(settings_for(moe, **ROLLOUT)))
    batch, own = one_batch(), one_batch(with_experts=False)
    assert batch.routed_experts is not None
    said = batch.routed_experts.clone()
    replayed, free = (ours.log_probs([packed], "actor", entropy=False)[0].log_probs for packed in (batch, own))
    assert (replayed - free).abs().max() > 1e-2
    assert torch.equal(batch.routed_experts[said >= 0], said[said >= 0])
    assert (said < 0).any() and (batch.routed_experts >= 0).all(), "of last tokens, the trainer's choice is kept"


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe"])
def test_every_kind_of_router_weighs_the_experts_it_is_told_as_in_transformers(family: str, tmp_path: Path) -> None:
    num_layers = write_tiny_model(family, tmp_path).config.num_hidden_layers
    args = settings_for(tmp_path, share_prompts=False, **ROLLOUT)
    found = []
    for backend in (loaded(make_backend(args)), loaded(make_megatron(args))):
        batch = one_batch(vocab_size=64)
        assert batch.routed_experts is not None
        batch.routed_experts = batch.routed_experts[:, :num_layers]
        found.append(backend.log_probs([batch], "actor", entropy=False)[0].log_probs)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("modules", [{"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "full"])
def test_recomputed_routers_follow_too(modules: Any, moe: Path, tmp_path: Path) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    args = settings_for(moe, **SEVERAL_STEPS | ROLLOUT)
    runs = [
        routed_rollouts(loaded(make_megatron(args, **settings)), args, tmp_path)
        for settings in ({}, full if modules == "full" else modules)
    ]
    assert_alike(runs[1], runs[0])


def test_models_and_settings_without_replay_are_refused(model: Path, moe: Path) -> None:
    with pytest.raises(ValueError, match="the model has no routers of experts"):
        loaded(make_megatron(settings_for(model, **OWN)))
    with pytest.raises(ValueError, match="--moe-router-fusion chooses in a kernel"):
        loaded(make_megatron(settings_for(moe, **OWN), megatron_args={"moe_router_fusion": True}))


def save(backend: TrainBackend, args: Args, path: Path) -> None:
    metrics = routed_rollouts(loaded(backend), args, path.parent)
    if dist.get_rank() == 0:
        torch.save(metrics, path)


def two_ranks_body(args: dict[str, Args], work: Path) -> None:
    with megatron_on_cpu():
        for kind, settings in args.items():
            for layout, parallel in LAYOUTS.items():
                save(make_megatron(settings, **parallel), settings, work / f"{kind}_{layout}.pt")
            save(
                make_backend(dataclasses.replace(settings, context_parallel_size=2)), settings, work / f"{kind}_fsdp.pt"
            )


@pytest.fixture(scope="module")
def runs(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("runs")
    dynamic = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 40, "share_prompts": False}
    kinds = {"rollout": ROLLOUT, "own": OWN}
    args = {kind: settings_for(moe, **SEVERAL_STEPS | dynamic | replay) for kind, replay in kinds.items()}
    for kind, settings in args.items():
        torch.save(routed_rollouts(loaded(make_backend(settings)), settings, work), work / f"{kind}.pt")
    run_ranks(two_ranks_body, 2, args, work, store=work / "store")
    return work


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["rollout", "own"])
def test_two_ranks_replay_as_one_of_fsdp(kind: str, layout: str, runs: Path) -> None:
    assert_alike(torch.load(runs / f"{kind}_{layout}.pt"), torch.load(runs / f"{kind}.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rollout", "own"])
def test_two_ranks_of_fsdp_that_share_tokens_replay_as_one(kind: str, runs: Path) -> None:
    ours, theirs = (torch.load(runs / name) for name in (f"{kind}_fsdp.pt", f"{kind}.pt"))
    for found, expected in zip(ours, theirs, strict=True):
        mismatch = expected["train/routing_replay_mismatch"]  # a token that fills a place left over counts twice
        assert found.pop("train/routing_replay_mismatch") == pytest.approx(mismatch, abs=0.01)
        found["train/routing_replay_mismatch"] = mismatch
    assert_alike(ours, theirs)
