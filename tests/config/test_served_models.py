"""The file of --sglang-config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slime.arguments import Args, settings_as_dict
from slime.config import ConfigError
from slime.config.run import RunConfig
from slime.config.served_models import ServedModel, ServerGroup, read_served_models
from slime.config.validate import resolve

POLICY = {"name": "actor", "server_groups": [{"worker_type": "regular", "num_gpus": 2}]}
JUDGE = {"name": "judge", "model_path": "/judge", "server_groups": [{"worker_type": "regular", "num_gpus": 1}]}
RUN: dict[str, Any] = {
    "hf_checkpoint": "/model",
    "prompt_data": "prompts.jsonl",
    "rollout_batch_size": 4,
    "n_samples_per_prompt": 2,
    "num_rollout": 3,
    "actor_num_gpus_per_node": 1,
}


def write(folder: Path, models: Any) -> str:
    """A file of these models."""
    path = folder / "engines.yaml"
    path.write_text(yaml.safe_dump({"sglang": models}))
    return str(path)


def read(folder: Path, models: Any) -> tuple[ServedModel, ...]:
    return read_served_models(write(folder, models), checkpoint="/model", num_gpus_per_engine=1)


def with_groups(*groups: dict[str, Any], **model: Any) -> list[dict[str, Any]]:
    """A file of the policy alone."""
    return [{"name": "actor", "server_groups": list(groups)} | model]


def test_what_a_model_does_not_say_follows_from_the_run(tmp_path: Path) -> None:
    policy, judge = read(tmp_path, [POLICY, JUDGE])
    assert policy == ServedModel("actor", "/model", update_weights=True, groups=(ServerGroup("regular", 2, 1),))
    assert judge == ServedModel("judge", "/judge", update_weights=False, groups=(ServerGroup("regular", 1, 1),))


def test_a_copy_of_the_checkpoint_may_stay_as_it_is(tmp_path: Path) -> None:
    _, reference = read(tmp_path, [POLICY, JUDGE | {"model_path": "/model", "update_weights": False}])
    assert (reference.model_path, reference.update_weights) == ("/model", False)


def test_the_size_of_engines_is_that_of_the_group_then_of_the_model_then_of_the_run(tmp_path: Path) -> None:
    groups = (
        {"worker_type": "prefill", "num_gpus": 4},
        {"worker_type": "decode", "num_gpus": 8, "num_gpus_per_engine": 4, "overrides": {"mem-fraction-static": 0.8}},
        {"worker_type": "placeholder", "num_gpus": 3},
    )
    (policy,) = read(tmp_path, with_groups(*groups, num_gpus_per_engine=2))
    assert [group.num_gpus_per_engine for group in policy.groups] == [2, 4, 2]
    assert [group.num_engines for group in policy.groups] == [2, 2, 0]
    assert (policy.num_engines, policy.num_gpus, policy.is_disaggregated) == (4, 12, True)
    assert policy.groups[1].overrides == {"mem_fraction_static": 0.8}


REGULAR = {"worker_type": "regular", "num_gpus": 2}
REFUSED: list[tuple[Any, str]] = [
    ({}, r"sglang: must be a list with an entry at least, got {}"),
    (["actor"], r"sglang\[0\]: must be a table, got 'actor'"),
    ([POLICY | {"servers": 1}], r"sglang\[0\]: unknown key servers; there are model_path, name"),
    ([POLICY | {"name": "a/b"}], r"name must be letters, digits, '_', '.' and '-', got 'a/b'"),
    ([POLICY | {"model_path": 3}], r"\(actor\): model_path must be a directory, got 3"),
    ([POLICY | {"update_weights": "yes"}], "update_weights must be true or false, got 'yes'"),
    ([POLICY, JUDGE | {"update_weights": True}], r"\(judge\): update_weights needs the model that is trained"),
    ([POLICY, POLICY], "two models have one name: actor, actor"),
    ([POLICY, POLICY | {"name": "twin"}], "one model must take the weights .* got actor and twin"),
    ([JUDGE], "one model must take the weights that are trained .* got none"),
    ([POLICY | {"name": "policy"}, JUDGE | {"name": "actor"}], "the name actor is that of the policy"),
    (with_groups(), r"server_groups: must be a list with an entry at least"),
    (with_groups({"worker_type": "encoder", "num_gpus": 1}), "worker_type must be one of regular, prefill, decode, pl"),
    (with_groups({"worker_type": "regular"}), r"server_groups\[0\]: num_gpus must be a whole number above 0, got None"),
    (with_groups(REGULAR | {"num_gpus": True}), "num_gpus must be a whole number above 0, got True"),
    (with_groups(REGULAR | {"num_gpus_per_engine": 3}), "num_gpus_per_engine 3 must divide num_gpus 2"),
    (with_groups(REGULAR | {"overrides": [1]}), r"overrides must be a table of SGLang's settings, got \[1\]"),
    (with_groups(REGULAR | {"overrides": {"context_length": 9}}), "is one for all: use --sglang-context-length"),
    (with_groups({"worker_type": "prefill", "num_gpus": 1}), "must be regular, or prefill and decode, got prefill"),
    (with_groups({"worker_type": "placeholder", "num_gpus": 1}), "must be regular, or prefill and decode, got none"),
]


@pytest.mark.parametrize(("models", "message"), REFUSED)
def test_a_file_that_cannot_be_served_is_refused_with_the_place(models: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, models)
    assert str(caught.value).startswith(f"--sglang-config: {tmp_path}/engines.yaml: ")


def test_a_file_without_models_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    path.write_text("models: []")
    with pytest.raises(ConfigError, match="must hold one key, sglang, got models"):
        read_served_models(str(path), checkpoint="/model", num_gpus_per_engine=1)


# --- in a run


def test_the_slots_of_a_run_are_those_of_the_file(tmp_path: Path) -> None:
    args = resolve(Args(**RUN, sglang_config=write(tmp_path, [JUDGE, POLICY])))
    assert args.rollout_num_gpus == 3
    assert [model.name for model in args.served_models] == ["judge", "actor"]
    assert (args.policy.name, args.num_engines, args.policy_engine_size) == ("actor", 2, None)
    assert resolve(args).file_models == args.file_models
    assert not {"file_models", "sglang_model_routers"} & settings_as_dict(args).keys()


def test_without_a_file_the_policy_is_what_flags_say() -> None:
    plain = RunConfig(hf_checkpoint="/model", rollout_num_gpus=8, rollout_num_gpus_per_engine=2)
    assert plain.served_models == (
        ServedModel("actor", "/model", update_weights=True, groups=(ServerGroup("regular", 8, 2),)),
    )
    assert (plain.num_engines, plain.policy_engine_size) == (4, 2)
    split = RunConfig(rollout_num_gpus=8, rollout_num_gpus_per_engine=2, prefill_num_servers=1)
    assert split.policy.groups == (ServerGroup("prefill", 2, 2), ServerGroup("decode", 6, 2))
    assert (split.num_engines, split.policy.is_disaggregated) == (4, True)


def test_a_run_that_only_trains_does_not_read_the_file() -> None:
    sft = {"debug_train_only": True, "rollout_function_path": "slime.rollout.sft_rollout.generate_rollout"}
    args = resolve(Args(**RUN, **sft, sglang_config="/gone.yaml"))
    assert (args.file_models, args.rollout_num_gpus) == ((), 0)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"prefill_num_servers": 1}, "--sglang-config names all engines, and starts a router for each model: drop --prefi"),
    ({"rollout_external_engine_addrs": ["a:1"]}, "drop --rollout-external-engine-addrs"),
    ({"sglang_router_ip": "a", "sglang_router_port": 1}, "drop --sglang-router-ip"),
    ({"rollout_num_gpus": 4}, "its groups have 3 slots in all, --rollout-num-gpus 4: they must be equal"),
    ({"colocate": True}, r"its groups have 3 slots in all, the trainers' slots \(--colocate\) 1"),
    (
        {"colocate": True, "actor_num_gpus_per_node": 3, "update_weight_transport": "tensor"},
        "--update-weight-transport tensor needs engines of the policy alone",
    ),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_what_contradicts_the_file_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(Args(**RUN | settings, sglang_config=write(tmp_path, [POLICY, JUDGE])))
