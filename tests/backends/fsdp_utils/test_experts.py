"""Mixtures of experts; that they equal transformers sequence by sequence is tested in test_model.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, random_batch, settings_for
from safetensors.torch import load_file
from transformers.integrations import moe

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, TokenOutputs, Wants

STEADY = {"adam_eps": 1e-4, "lr": 1e-3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config asks for an auxiliary loss of the router, as if it were pre-trained on."""
    folder = tmp_path_factory.mktemp("moe")
    return make_tiny_model(folder, "qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)


def loaded(directory: Path, **settings: Any) -> FSDPBackend:
    backend = make_backend(settings_for(directory, **STEADY | settings))
    backend.load()
    return backend


def one_batch() -> PackedBatch:
    batch = random_batch()
    return pack_rows(batch, range(len(batch)), batch.loss_mask / batch.loss_mask.sum())


def likelihood(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
    loss = -(batch.loss_weights * outputs.log_probs).sum()
    return LossOutput(loss, {"loss": loss.detach()})


def stepped(backend: FSDPBackend) -> dict[str, torch.Tensor]:
    for _ in range(2):
        backend.train_step([one_batch()], likelihood, wants=Wants())
    return full_weights(backend)


VARIANTS: dict[str, dict[str, Any]] = {
    "one by one": {"experts_implementation": "eager"},
    "batched": {"experts_implementation": "batched_mm"},
    "recomputed": {"gradient_checkpointing": True},
    "offloaded": {"fsdp_cpu_offload": True},
    "compiled": {"torch_compile": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "compiled" else ()) for name in VARIANTS]
)
def test_however_experts_compute_they_train_alike(directory: Path, name: str) -> None:
    expected = stepped(loaded(directory))
    for tensor, weight in stepped(loaded(directory, **VARIANTS[name])).items():
        torch.testing.assert_close(weight, expected[tensor], rtol=0, atol=1e-5, msg=tensor)


def test_experts_compute_in_groups_unless_told_otherwise(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    grouped = moe._grouped_mm
    monkeypatch.setattr(moe, "_grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped(*args, **kwargs))
    loaded(directory).log_probs([one_batch()], "actor", entropy=False)
    assert len(calls) == 2 * 2, "layers x (gate and up, down)"
    loaded(directory, experts_implementation="eager").log_probs([one_batch()], "actor", entropy=False)
    assert len(calls) == 4


def test_an_implementation_that_is_none_is_refused_by_name(directory: Path) -> None:
    with pytest.raises(ValueError, match=r'experts_implementation="loop"` is not supported'):
        loaded(directory, experts_implementation="loop")


def test_the_loss_is_that_of_the_tokens_alone(directory: Path, tmp_path: Path) -> None:
    """No auxiliary loss of the router, whatever its config says: the same seed without one trains the same."""
    plain = make_tiny_model(tmp_path, "qwen3_moe")
    ours, theirs = loaded(directory), loaded(plain)
    assert all(torch.equal(*pair) for pair in zip(stepped(ours).values(), stepped(theirs).values(), strict=True))


def test_after_training_weights_have_the_names_and_shapes_of_the_checkpoint(directory: Path) -> None:
    stored = load_file(directory / "model.safetensors")
    weights = stepped(loaded(directory))
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in stored.items()}
    moved = [name for name in weights if ".experts." in name and not torch.equal(weights[name], stored[name])]
    assert len(moved) == sum(".experts." in name for name in stored), "every expert was sent as it is now"
