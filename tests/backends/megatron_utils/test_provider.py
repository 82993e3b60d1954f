"""Models that a user's function builds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_training import STEADY, make_megatron, two_critic_rollouts, two_rollouts
from helpers.training import settings_for


@pytest.mark.parametrize("function", ["with_all_arguments", "with_positions_alone"])
def test_a_model_of_the_users_loads_trains_saves_and_goes_on_as_slimes_own(
    function: str, model: Path, tmp_path: Path
) -> None:
    args = settings_for(model, save=str(tmp_path / "save"), **STEADY)
    path = f"helpers.megatron_providers.{function}"
    own: Any = make_megatron(args, custom_model_provider_path=path)
    usual = make_megatron(args)
    own.load(), usual.load()
    found, expected = (two_rollouts(backend, args, tmp_path) for backend in (own, usual))
    assert found.metrics == expected.metrics
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())
    assert function == "with_positions_alone" or own.chunk.lms[0].num_forwards > 0
    own.save(1)
    again = make_megatron(dataclasses.replace(args, load=args.save), custom_model_provider_path=path)
    assert again.load() == 2
    assert two_rollouts(again, args, tmp_path).metrics == two_rollouts(usual, args, tmp_path).metrics


def test_a_critic_of_the_users_gets_a_value_head(model: Path) -> None:
    args = settings_for(model, advantage_estimator="ppo", num_steps_per_rollout=2, **STEADY)
    found = []
    for settings in ({}, {"custom_model_provider_path": "helpers.megatron_providers.with_all_arguments"}):
        critic = make_megatron(args, role="critic", **settings)
        critic.load()
        found.append(two_critic_rollouts(critic, args))
    assert found[0][0] == found[1][0]
    assert found[0][1][1].abs().max() > 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("not_a_model", "must return a GPTModel of Megatron-core, got Linear"),
        ("another_stage", "of a stage with pre_process True, post_process True it made one with True, False"),
        ("of_another_width", r"mlp.linear_fc1.weight has shape \(320, 64\), config.json asks for \(256, 64\)"),
        ("with_fewer_layers", "its stage has 1 layers, 2 are this rank's"),
        (
            "without_query_norms",
            "its model has no decoder.layers.0.self_attention.q_layernorm.weight, which config.json",
        ),
        ("with_a_parameter_more", "layers.0.gate of the Megatron model is in no table of qwen3, so that engines"),
    ],
)
def test_what_is_no_stage_of_this_model_is_refused(function: str, message: str, model: Path) -> None:
    backend = make_megatron(settings_for(model), custom_model_provider_path=f"helpers.megatron_providers.{function}")
    with pytest.raises(ValueError, match=f"--custom-model-provider-path helpers.*{message}"):
        backend.load()
