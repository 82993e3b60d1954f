"""Everything about two ranks happens in one pair of processes: see `two_ranks`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_tiny_model
from helpers.training import (
    full_weights,
    make_backend,
    make_recipe,
    random_batch,
    random_samples,
    run_ranks,
    settings_for,
)
from safetensors.torch import load_file

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.data.batch import TrainBatch, batch_from_samples
from slime.data.packed import pack_rows
from slime.training.backend import LossOutput, TokenOutputs, TrainBackend, Wants
from slime.training.recipe import TrainingDiverged

STEADY = {"adam_eps": 1e-4, "lr": 1e-3}
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 40, "num_steps_per_rollout": 2},
    "per_token": {"calculate_per_token_loss": True, "balance_data": False},
    "kl_shaping": {"kl_coef": 0.2, "use_ref": True},
    "one_sample": {"rewards_normalization": False, "only_row": 3},
}


def run_scenario(name: str, model: Path, other_model: Path, out: Path) -> None:
    """Two rollouts; rank 0 writes the metrics and the weights to `out`."""
    settings = dict(STEADY | SCENARIOS[name])
    row = settings.pop("only_row", None)
    if settings.pop("use_ref", False):
        settings |= {"ref_load": str(other_model), "load": str(model)}
    args = settings_for(model, **settings)
    backend = make_backend(args)
    assert backend.load() == 0
    recipe = make_recipe(backend, args, out)
    metrics = []
    for rollout_id in range(2):
        batch = random_batch(seed=rollout_id, group_sizes=(3, 1, 4))
        metrics.append(recipe.train(rollout_id, batch if row is None else batch.select([row])))
    weights = full_weights(backend)
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(metrics))
        torch.save(weights, out / f"{name}.pt")


def train_one(backend: FSDPBackend, args: Any, rollout_id: int, dump_dir: Path) -> None:
    make_recipe(backend, args, dump_dir).train(rollout_id, random_batch(seed=rollout_id))


def interrupted(model: Path, folder: Path, *, save: bool) -> None:
    """Rollouts 0 and 1 and, with `save`, a checkpoint after the first; the last weights as `weights.pt`."""
    args = settings_for(model, save=str(folder), **STEADY | {"num_steps_per_rollout": 2})
    backend = make_backend(args)
    backend.load()
    train_one(backend, args, 0, folder)
    if save:
        backend.save(0)
    train_one(backend, args, 1, folder)
    weights = full_weights(backend)
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")


def resumed(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Load the checkpoint in `folder` and do what was left: rollout 1."""
    args = settings_for(model, load=str(folder), **STEADY | {"num_steps_per_rollout": 2})
    backend = make_backend(args)
    assert backend.load() == 1
    assert backend.num_steps == 2
    train_one(backend, args, 1, folder)
    return full_weights(backend)


def two_rank_body(model: Path, other_model: Path, moe: Path, work: Path) -> None:
    for name in SCENARIOS:
        run_scenario(name, model, other_model, work / "two")
    run_scenario("plain", moe, moe, work / "two_moe")
    interrupted(model, work / "saved_by_two", save=True)
    weights = resumed(model, work / "saved_by_one")
    again = resumed(model, work / "saved_by_two")
    if dist.get_rank() == 0:
        torch.save(weights, work / "resumed_by_two.pt")
        torch.save(again, work / "two_to_two.pt")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"), "qwen3_moe")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, model: Path, other_model: Path, moe: Path) -> Path:
    """The folder in which one rank and then two ranks left what they computed."""
    work = tmp_path_factory.mktemp("ranks")
    for name in SCENARIOS:
        run_scenario(name, model, other_model, work / "one")
    run_scenario("plain", moe, moe, work / "one_moe")
    interrupted(model, work / "saved_by_one", save=True)
    run_ranks(two_rank_body, 2, model, other_model, moe, work, store=work / "store")
    return work


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_as_one(name: str, two_ranks: Path) -> None:
    one = json.loads((two_ranks / "one" / f"{name}.json").read_text())
    two = json.loads((two_ranks / "two" / f"{name}.json").read_text())
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    close(torch.load(two_ranks / "two" / f"{name}.pt"), torch.load(two_ranks / "one" / f"{name}.pt"))


def test_two_ranks_train_a_mixture_of_experts_as_one(two_ranks: Path) -> None:
    close(torch.load(two_ranks / "two_moe" / "plain.pt"), torch.load(two_ranks / "one_moe" / "plain.pt"))


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(two_ranks: Path, model: Path, tmp_path: Path) -> None:
    uninterrupted = torch.load(two_ranks / "saved_by_one" / "weights.pt")
    assert equal(resumed(model, two_ranks / "saved_by_one"), uninterrupted)
    interrupted(model, tmp_path, save=False)
    assert equal(torch.load(tmp_path / "weights.pt"), uninterrupted)  # and saving itself changed nothing


def test_two_ranks_resume_bit_for_bit(two_ranks: Path) -> None:
    assert equal(torch.load(two_ranks / "two_to_two.pt"), torch.load(two_ranks / "saved_by_two" / "weights.pt"))


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_the_reverse(two_ranks: Path, model: Path) -> None:
    close(resumed(model, two_ranks / "saved_by_two"), torch.load(two_ranks / "saved_by_two" / "weights.pt"))
    close(torch.load(two_ranks / "resumed_by_two.pt"), torch.load(two_ranks / "saved_by_one" / "weights.pt"))


# --- one rank


def loaded(model: Path, **settings: Any) -> FSDPBackend:
    backend = make_backend(settings_for(model, **settings))
    backend.load()
    return backend


def one_batch(batch: TrainBatch | None = None) -> Any:
    batch = batch or random_batch()
    return pack_rows(batch, range(len(batch)), batch.loss_mask / batch.loss_mask.sum())


def likelihood(outputs: TokenOutputs, batch: Any, sequence_sum: Any) -> LossOutput:
    loss = -(batch.loss_weights * outputs.log_probs).sum()
    return LossOutput(loss, {"loss": loss.detach()})


def test_it_satisfies_the_seam(model: Path) -> None:
    backend = make_backend(settings_for(model))
    assert backend.layout.data_size == backend.layout.world_size == 1
    assert backend.layout.is_reporter
    for name, wanted in inspect.getmembers(TrainBackend, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(FSDPBackend, name))
            assert list(ours.parameters) == list(inspect.signature(wanted).parameters), name
            kinds = [parameter.kind for parameter in ours.parameters.values()]
            assert kinds == [parameter.kind for parameter in inspect.signature(wanted).parameters.values()], name


def test_sequence_sums_add_up_each_sequence(model: Path) -> None:
    batch = one_batch()
    sums: list[torch.Tensor] = []

    def loss(outputs: TokenOutputs, batch: Any, sequence_sum: Any) -> LossOutput:
        sums.append(sequence_sum(batch.loss_mask))
        return likelihood(outputs, batch, sequence_sum)

    loaded(model).train_step([batch], loss, wants=Wants())
    assert sums[0].tolist() == [sum(sample.loss_mask or []) for sample in random_samples()]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step_count(model: Path, what: str) -> None:
    backend = loaded(model)
    backend.train_step([one_batch()], likelihood, wants=Wants())
    weights = full_weights(backend)
    state = [{name: value.clone() for name, value in entry.items()} for entry in backend.optimizer.state.values()]

    def broken(outputs: TokenOutputs, batch: Any, sequence_sum: Any) -> LossOutput:
        loss = likelihood(outputs, batch, sequence_sum).loss
        if what == "loss":
            loss = loss + torch.tensor(float("nan"))
        else:  # finite itself, with a gradient that is not
            loss = loss + (outputs.log_probs * 0).sqrt().sum() * 0
        return LossOutput(loss, {"loss": loss.detach()})

    result = backend.train_step([one_batch()], broken, wants=Wants())
    assert result.skipped
    assert equal(full_weights(backend), weights)
    for entry, before in zip(backend.optimizer.state.values(), state, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in entry.items())
    assert backend.num_steps == 2
    assert not backend.train_step([one_batch()], likelihood, wants=Wants()).skipped


def test_gradients_take_no_memory_between_steps(model: Path) -> None:
    backend = loaded(model)
    backend.train_step([one_batch()], likelihood, wants=Wants())
    assert all(parameter.grad is None for parameter in backend.models["actor"].parameters())


def test_a_run_stops_after_the_skipped_steps_it_allows(model: Path, tmp_path: Path) -> None:
    args = settings_for(model, max_skipped_steps=1, rewards_normalization=False)
    backend = make_backend(args)
    backend.load()
    recipe = make_recipe(backend, args, tmp_path)
    samples = random_samples()
    batch = batch_from_samples(samples, [1.0] * 8)
    batch.rewards[0] = float("nan")
    weights = full_weights(backend)
    assert recipe.train(0, batch)["train/skipped_steps"] == 1
    with pytest.raises(TrainingDiverged, match=r"2 optimizer steps .* \(--max-skipped-steps 1\)"):
        recipe.train(1, batch)
    assert equal(full_weights(backend), weights)
    dumped = [json.loads(line) for line in (tmp_path / "rollout_000001_step_000_rank_0000.jsonl").open()]
    assert sorted(record["index"] for record in dumped) == list(range(8))
    assert {tuple(record["tokens"]) for record in dumped} == {tuple(sample.tokens) for sample in samples}


def test_gradients_are_clipped_to_the_norm_asked_for(model: Path) -> None:
    free, clipped = loaded(model, clip_grad=0.0), loaded(model, clip_grad=0.001)
    norms = {}
    for backend in (free, clipped):

        def note(*_: Any, backend: FSDPBackend = backend) -> None:
            gradients = [p.grad.full_tensor() for p in backend.models["actor"].parameters()]
            norms[backend.run.clip_grad] = float(torch.nn.utils.get_total_norm(gradients))

        backend.optimizer.register_step_pre_hook(note)
    reported = [backend.train_step([one_batch()], likelihood, wants=Wants()).grad_norm for backend in (free, clipped)]
    assert reported[0] == pytest.approx(reported[1])
    assert norms[0.0] == pytest.approx(reported[0], rel=1e-5)
    assert norms[0.001] == pytest.approx(0.001, rel=1e-3)


def test_weight_decay_is_for_matrices_only(model: Path) -> None:
    backend = loaded(model, weight_decay=0.5, lr=0.1)

    def nothing(outputs: TokenOutputs, batch: Any, sequence_sum: Any) -> LossOutput:
        loss = (outputs.log_probs * 0).sum()
        return LossOutput(loss, {"loss": loss.detach()})

    before = full_weights(backend)
    backend.train_step([one_batch()], nothing, wants=Wants())
    for name, weight in full_weights(backend).items():
        shrunk = before[name] * (1 - 0.1 * 0.5) if weight.ndim >= 2 else before[name]
        torch.testing.assert_close(weight, shrunk)


def test_the_learning_rate_follows_the_schedule(model: Path) -> None:
    backend = loaded(model, lr=1e-3, lr_warmup_iters=2, lr_decay_style="linear", num_rollout=4)
    rates = [backend.train_step([one_batch()], likelihood, wants=Wants()).lr for _ in range(4)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])


def test_dropout_is_off_for_training_too(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, "qwen2", attention_dropout=0.5)
    for checkpointing in (False, True):
        backend = loaded(directory, attn_implementation="sdpa", gradient_checkpointing=checkpointing)
        seen: list[torch.Tensor] = []

        def note(outputs: TokenOutputs, *rest: Any, seen: list[torch.Tensor] = seen) -> LossOutput:
            seen.append(outputs.log_probs.detach())
            return likelihood(outputs, *rest)

        expected = backend.log_probs([one_batch()], "actor", entropy=False)[0].log_probs
        backend.train_step([one_batch()], note, wants=Wants())
        assert torch.equal(seen[0], expected)


def test_gradient_checkpointing_runs_each_layer_again(model: Path) -> None:
    calls = {}
    for checkpointing in (False, True):
        backend = loaded(model, gradient_checkpointing=checkpointing)
        counted: list[int] = []
        layer = backend.models["actor"].lm.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        backend.train_step([one_batch()], likelihood, wants=Wants())
        calls[checkpointing] = len(counted)
    assert calls == {False: 1, True: 2}


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(model: Path) -> None:
    backend = loaded(model, bf16=True)
    exact = loaded(model).log_probs([one_batch()], "actor", entropy=True)[0]
    rounded = backend.log_probs([one_batch()], "actor", entropy=True)[0]
    assert not torch.equal(rounded.log_probs, exact.log_probs)
    assert rounded.log_probs.dtype == torch.float32
    torch.testing.assert_close(rounded.log_probs, exact.log_probs, rtol=0, atol=0.2)
    backend.train_step([one_batch()], likelihood, wants=Wants())
    assert all(parameter.dtype == torch.float32 for parameter in backend.models["actor"].parameters())


def test_the_reference_stays_where_it_was_while_the_actor_moves(model: Path, other_model: Path) -> None:
    backend = loaded(model, use_kl_loss=True, ref_load=str(other_model), load=str(model))
    before = backend.log_probs([one_batch()], "ref", entropy=False)[0].log_probs
    backend.train_step([one_batch()], likelihood, wants=Wants())
    assert torch.equal(backend.log_probs([one_batch()], "ref", entropy=False)[0].log_probs, before)
    own = loaded(other_model).log_probs([one_batch()], "actor", entropy=False)[0].log_probs
    assert torch.equal(own, before)


def test_without_a_place_to_load_from_the_actor_starts_as_the_reference(model: Path, other_model: Path) -> None:
    assert equal(full_weights(loaded(model, ref_load=str(other_model))), full_weights(loaded(other_model)))


def test_a_reference_that_is_a_checkpoint_starts_the_actor_too(model: Path, other_model: Path, tmp_path: Path) -> None:
    source = make_backend(settings_for(other_model, save=str(tmp_path)))
    source.load()
    source.save(4)
    backend = make_backend(settings_for(model, use_kl_loss=True, ref_load=str(tmp_path)))
    assert backend.load() == 0
    expected = load_file(other_model / "model.safetensors")
    assert equal(full_weights(backend), expected)
    logs = [backend.log_probs([one_batch()], tag, entropy=False)[0].log_probs for tag in ("actor", "ref")]  # type: ignore[arg-type]
    assert torch.equal(*logs)


def test_a_hugging_face_directory_is_a_place_to_load_from(model: Path, other_model: Path) -> None:
    assert equal(full_weights(loaded(model, load=str(other_model))), load_file(other_model / "model.safetensors"))


def test_a_reference_that_is_nothing_is_named_even_where_it_would_not_be_used(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--ref-load {tmp_path} holds neither a model nor a checkpoint"):
        loaded(model, ref_load=str(tmp_path))


def test_placeholders_alone_make_a_step_of_no_gradient(model: Path) -> None:
    backend = loaded(model)
    before = full_weights(backend)
    empty = pack_rows(random_batch(), [], np.zeros(0, dtype=np.float32))
    result = backend.train_step([empty], likelihood, wants=Wants())
    assert result.grad_norm == 0.0
    assert equal(full_weights(backend), before)


def test_on_a_cpu_a_backend_that_slept_trains_as_one_that_did_not(model: Path) -> None:
    slept, awake = loaded(model), loaded(model)
    for _ in range(2):
        slept.sleep()
        slept.wake_up()
        for backend in (slept, awake):
            backend.train_step([one_batch()], likelihood, wants=Wants())
    assert equal(full_weights(slept), full_weights(awake))
