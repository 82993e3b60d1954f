"""Layers that are compiled beside those that are not: the same parameters, float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_training import STEADY, make_megatron, two_rollouts
from helpers.model_families import write_tiny_model
from helpers.tiny_models import make_tiny_model
from helpers.training import settings_for

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def trained(model: Path, folder: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient norms and weights of two rollouts."""
    args = settings_for(model, **STEADY)
    backend = make_megatron(args, **settings)
    backend.load()
    assert backend.is_compiled == settings.get("torch_compile", False)  # type: ignore[attr-defined]
    run = two_rollouts(backend, args, folder)
    return [metrics["train/grad_norm"] for metrics in run.metrics], run.weights


def assert_same(
    ours: tuple[list[float], dict[str, torch.Tensor]], theirs: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name, tensor in ours[1].items():
        torch.testing.assert_close(tensor, theirs[1][name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_layers_that_are_compiled_have_the_maths_of_megatron_s(architecture: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture)
    assert_same(trained(model, tmp_path, torch_compile=True), trained(model, tmp_path))


@pytest.mark.slow
def test_the_compiler_follows_a_layer_as_a_whole_in_one_version_for_all_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=3)
    expected = trained(model, tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("default"):
        found = trained(model, tmp_path, torch_compile=True, **RECOMPUTE)
    assert_same(found, expected)
    pieces, modes = 2, 4  # with and without gradient, in training and outside of it
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= pieces * modes


def test_what_cannot_be_compiled_is_named_and_computed_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for family in ("qwen3_moe", "glm4"):
        write_tiny_model(family, tmp_path / family)
        backend = make_megatron(settings_for(tmp_path / family), torch_compile=True)
        assert not backend.is_compiled  # type: ignore[attr-defined]
        assert "--torch-compile has no effect" in caplog.text
        caplog.clear()
