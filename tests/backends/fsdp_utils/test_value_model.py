"""The critic: its model, and the backend in that role. All about two ranks happens in one pair of processes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import plain_grpo
from helpers.tiny_models import make_tiny_model
from helpers.training import random_batch, random_samples, run_ranks, settings_for
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from slime.arguments import Args
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.fsdp_utils.model import load_causal_lm
from slime.backends.fsdp_utils.sources import critic_run
from slime.backends.fsdp_utils.value_model import ValueModel
from slime.backends.shared.checkpoint import CheckpointError
from slime.data.batch import batch_from_samples
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, TokenOutputs, Wants
from slime.utils.types import Sample

MODELS: dict[str, dict[str, Any]] = {"qwen3": {}, "qwen2": {"tie_word_embeddings": True}, "llama": {}, "qwen3_moe": {}}
STEADY = {"adam_eps": 1e-4, "critic_lr": 1e-2, "critic_lr_warmup_iters": 2, "advantage_estimator": "ppo"}


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"), request.param, **MODELS[request.param])


def packed(samples: list[Sample], rows: Any = None) -> PackedBatch:
    batch = batch_from_samples(samples, [0.0] * len(samples))
    return pack_rows(batch, range(len(batch)) if rows is None else rows, batch.loss_mask / batch.loss_mask.sum())


def value_model(directory: Path, *, share_prompts: bool = True) -> ValueModel:
    lm = load_causal_lm(str(directory), attn_implementation="packed").eval()
    return ValueModel(lm, share_prompts=share_prompts)


# --- the model


def test_a_new_critic_expects_nothing(directory: Path) -> None:
    outputs = value_model(directory)(packed(random_samples()), Wants())
    assert outputs.values is not None
    assert outputs.values.dtype == torch.float32
    assert not outputs.values.any()
    assert not outputs.log_probs.any()
    assert outputs.values.requires_grad
    assert not outputs.log_probs.requires_grad


@pytest.mark.parametrize("share_prompts", [True, False])
def test_values_and_gradients_are_those_of_a_plain_model_under_a_linear_head(
    directory: Path, share_prompts: bool
) -> None:
    samples = random_samples()
    batch = packed(samples)
    model = value_model(directory, share_prompts=share_prompts)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    torch.nn.init.normal_(model.head.bias)
    weights = torch.linspace(-1, 1, len(batch.target_index))
    values = model(batch, Wants()).values
    (values.square() * weights).sum().backward()

    plain = plain_grpo.load(directory)
    head = torch.nn.Linear(*model.head.weight.shape[::-1], dtype=torch.float64)
    head.load_state_dict({name: tensor.double() for name, tensor in model.head.state_dict().items()})
    expected = []
    for sample in samples:
        hidden = plain.get_decoder()(input_ids=torch.tensor([sample.tokens]), use_cache=False).last_hidden_state[0]
        first = len(sample.tokens) - sample.response_length
        expected.append(head(hidden[first - 1 : -1])[:, 0])  # before each response token
    (torch.cat(expected).square() * weights.double()).sum().backward()

    torch.testing.assert_close(values.double(), torch.cat(expected), rtol=0, atol=2e-5)
    theirs = dict(plain.get_decoder().named_parameters()) | {"head.weight": head.weight, "head.bias": head.bias}
    for name, parameter in model.named_parameters():
        reference = theirs[name.removeprefix("decoder.")].grad
        assert (parameter.grad.double() - reference).norm() < 1e-4 * max(float(reference.norm()), 1e-2), name


def test_the_head_for_tokens_is_gone(directory: Path) -> None:
    assert {name.split(".")[0] for name, _ in value_model(directory).named_parameters()} == {"decoder", "head"}


# --- the backend


def critic_settings_for(model: Path, **overrides: Any) -> Args:
    return critic_run(settings_for(model, **STEADY | overrides))


def loaded(run: Args, rollout_id: int = 0) -> FSDPBackend:
    backend = FSDPBackend(run, run, torch.device("cpu"), role="critic")
    assert backend.load() == rollout_id
    return backend


def squared_error(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
    """To numbers that differ from token to token."""
    assert outputs.values is not None
    assert batch.rollout_log_probs is not None
    return LossOutput((batch.loss_weights * (outputs.values - batch.rollout_log_probs).square()).sum(), {})


def step(backend: FSDPBackend, seed: int) -> dict[str, float]:
    """One optimizer step on this rank's half of the samples."""
    mine = range(backend.layout.data_rank, 8, backend.layout.data_size)
    result = backend.train_step([packed(random_samples(seed=seed), mine)], squared_error, wants=Wants())
    return {"loss": result.metrics["loss"], "grad_norm": result.grad_norm, "lr": result.lr}


def state_of(backend: FSDPBackend) -> dict[str, torch.Tensor]:
    state = get_model_state_dict(backend.models["critic"], options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in state.items()}


def values_of(backend: FSDPBackend) -> torch.Tensor:
    outputs = backend.log_probs([packed(random_samples())], "critic", entropy=False)
    assert outputs[0].values is not None
    return outputs[0].values


def three_steps(model: Path, folder: Path, *, save: bool = True) -> dict[str, Any]:
    backend = loaded(critic_settings_for(model, save=str(folder)))
    metrics = [step(backend, seed) for seed in range(2)]
    if save:
        backend.save(0)
    metrics.append(step(backend, 2))
    return {"metrics": metrics, "state": state_of(backend), "values": values_of(backend)}


def last_step(model: Path, folder: Path) -> dict[str, Any]:
    """The third of `three_steps`, from the checkpoint before it."""
    backend = loaded(critic_settings_for(model, critic_load=str(folder / "critic")), rollout_id=1)
    assert backend.num_steps == 2
    metrics = [step(backend, 2)]
    return {"metrics": metrics, "state": state_of(backend), "values": values_of(backend)}


def two_rank_body(model: Path, work: Path) -> None:
    results = {"run": three_steps(model, work / "two"), "resumed": last_step(model, work / "two")}
    if dist.get_rank() == 0:
        torch.save(results, work / "two.pt")


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Bit for bit, the last step and what it leaves."""
    assert ours["metrics"][-1] == theirs["metrics"][-1]
    assert torch.equal(ours["values"], theirs["values"])
    assert ours["state"].keys() == theirs["state"].keys()
    assert [name for name, tensor in ours["state"].items() if not torch.equal(tensor, theirs["state"][name])] == []


def test_two_ranks_train_a_critic_as_one_and_resume_bit_for_bit(model: Path, tmp_path: Path) -> None:
    run_ranks(two_rank_body, 2, model, tmp_path, store=tmp_path / "store")
    two = torch.load(tmp_path / "two.pt")
    one = three_steps(model, tmp_path / "one")
    for ours, theirs in zip(two["run"]["metrics"], one["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(two["run"]["values"], one["values"], rtol=0, atol=1e-4)
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["run"]["state"][name], tensor, rtol=0, atol=1e-4, msg=name)
    same(two["resumed"], two["run"])


def test_a_resumed_critic_equals_the_uninterrupted_one_bit_for_bit(model: Path, tmp_path: Path) -> None:
    uninterrupted = three_steps(model, tmp_path)
    same(last_step(model, tmp_path), uninterrupted)
    same(three_steps(model, tmp_path / "unsaved", save=False), uninterrupted)  # and saving itself changed nothing


def test_a_critic_learns_with_a_learning_rate_of_its_own(model: Path, tmp_path: Path) -> None:
    result = three_steps(model, tmp_path, save=False)
    assert [metrics["lr"] for metrics in result["metrics"]] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert result["state"]["head.weight"].any()
    assert result["values"].any()


def test_a_critic_computes_its_values_in_float32_under_bf16(model: Path, tmp_path: Path) -> None:
    uninterrupted = three_steps(model, tmp_path)
    half = loaded(critic_settings_for(model, critic_load=str(tmp_path / "critic"), bf16=True), rollout_id=1)
    exact = loaded(critic_settings_for(model, critic_load=str(tmp_path / "critic")), rollout_id=1)
    rounded = values_of(half)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, values_of(exact), rtol=0, atol=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in uninterrupted["state"].values())


def test_a_critic_holds_no_other_model(model: Path) -> None:
    run = critic_settings_for(model, kl_coef=0.1, use_opd=True, opd_teacher_load=str(model))
    assert loaded(run).models.keys() == {"critic"}


def test_gradient_checkpointing_changes_nothing_of_a_critic(model: Path) -> None:
    plain, recomputing = (
        loaded(critic_settings_for(model, gradient_checkpointing=checkpointing)) for checkpointing in (False, True)
    )
    counted: list[int] = []
    layer = recomputing.models["critic"].decoder.layers[0].mlp  # type: ignore[union-attr]
    layer.register_forward_pre_hook(lambda *_: counted.append(1))
    for seed in range(2):
        assert step(plain, seed) == step(recomputing, seed)
    assert len(counted) == 4


# --- where it starts from


def test_a_critic_starts_from_the_policys_weights_or_those_it_is_given(
    model: Path, other_model: Path, tmp_path: Path
) -> None:
    names = ("decoder.layers.0.mlp.up_proj.weight", "decoder.embed_tokens.weight")
    own, given = (state_of(loaded(critic_settings_for(model, critic_load=path))) for path in (None, str(other_model)))
    for state, path in ((own, model), (given, other_model)):
        lm = load_causal_lm(str(path), attn_implementation="packed")
        for name in names:
            assert torch.equal(state[name], lm.get_parameter(name.replace("decoder", "model"))), name
    with pytest.raises(CheckpointError, match=f"--critic-load {tmp_path} holds neither a model nor a checkpoint"):
        loaded(critic_settings_for(model, critic_load=str(tmp_path)))


def saved_pair(model: Path, folder: Path, steps: dict[str, list[int]]) -> None:
    """Checkpoints of actor and critic of a run with --save `folder`."""
    args = settings_for(model, **STEADY | {"save": str(folder)})
    backends = {
        "actor": FSDPBackend(args, args, torch.device("cpu")),
        "critic": loaded(critic_run(args)),
    }
    backends["actor"].load()
    for role, rollout_ids in steps.items():
        for rollout_id in rollout_ids:
            backends[role].save(rollout_id)


def test_a_critic_resumes_where_the_actor_does_and_not_where_it_was_saved_last(model: Path, tmp_path: Path) -> None:
    saved_pair(model, tmp_path, {"actor": [0, 1], "critic": [0, 1, 2]})
    resumed = critic_settings_for(model, save=str(tmp_path), resume=True)
    assert loaded(resumed, rollout_id=2).models.keys() == {"critic"}
    loaded(critic_settings_for(model, save=str(tmp_path), resume=True, ckpt_step=0), rollout_id=1)
    given = {"load": str(tmp_path), "critic_load": str(tmp_path / "critic")}
    loaded(critic_settings_for(model, **given), rollout_id=2)


def test_a_critic_that_the_actor_has_outrun_is_an_error(model: Path, tmp_path: Path) -> None:
    saved_pair(model, tmp_path, {"actor": [3], "critic": [1]})
    message = f"the actor continues from {tmp_path}/iter_0000003, but {tmp_path}/critic holds no critic of that rollout"
    with pytest.raises(CheckpointError, match=message):
        critic_settings_for(model, save=str(tmp_path), resume=True)


def test_a_critic_that_does_not_continue_beside_an_actor_that_does_is_told(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_pair(model, tmp_path, {"actor": [3], "critic": []})
    with caplog.at_level(logging.WARNING):
        loaded(critic_settings_for(model, load=str(tmp_path)))
    assert "iter_0000003, the critic does not" in caplog.text


def test_before_the_first_checkpoint_resume_starts_the_critic_it_is_given(
    model: Path, other_model: Path, tmp_path: Path
) -> None:
    fresh = critic_settings_for(model, save=str(tmp_path), resume=True, critic_load=str(other_model))
    given = critic_settings_for(other_model)
    assert all(
        torch.equal(*pair) for pair in zip(*(state_of(loaded(run)).values() for run in (fresh, given)), strict=True)
    )


def test_an_actors_checkpoint_is_no_critic(model: Path, tmp_path: Path) -> None:
    saved_pair(model, tmp_path, {"actor": [0]})
    with pytest.raises(CheckpointError, match=r"has no tensor decoder\..*: it is a checkpoint of another model"):
        loaded(critic_settings_for(model, critic_load=str(tmp_path)))


def test_finetune_takes_a_critics_weights_only(model: Path, tmp_path: Path) -> None:
    three_steps(model, tmp_path)
    backend = loaded(critic_settings_for(model, critic_load=str(tmp_path / "critic"), finetune=True))
    assert backend.num_steps == 0
    assert not backend.optimizer.state
    assert state_of(backend)["head.weight"].any()


def test_a_rank_without_samples_takes_part(model: Path) -> None:
    backend = loaded(critic_settings_for(model))
    batch = random_batch()
    empty = pack_rows(replace(batch), [], batch.loss_mask)
    assert backend.train_step([empty], squared_error, wants=Wants()).grad_norm == 0.0
