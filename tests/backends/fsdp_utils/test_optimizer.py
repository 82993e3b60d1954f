"""Which parameters are trained, and float16 with its loss scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.training import full_weights, make_backend, make_recipe, random_batch, run_ranks, settings_for

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.fsdp_utils.optimizer import LossScale
from slime.config.base import ConfigError
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, TokenOutputs, Wants

FP16 = {"fp16": True, "adam_eps": 1e-4, "lr": 1e-3}


def loaded(model: Path, **settings: Any) -> FSDPBackend:
    backend = make_backend(settings_for(model, **settings))
    backend.load()
    return backend


def one_batch(seed: int = 0) -> PackedBatch:
    batch = random_batch(seed=seed)
    return pack_rows(batch, range(len(batch)), batch.loss_mask / batch.loss_mask.sum())


def likelihood(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
    loss = -(batch.loss_weights * outputs.log_probs).sum()
    return LossOutput(loss, {"loss": loss.detach()})


def step(backend: FSDPBackend, loss: Any = likelihood, seed: int = 0) -> Any:
    return backend.train_step([one_batch(seed)], loss, wants=Wants())


def state_of(backend: FSDPBackend) -> list[torch.Tensor]:
    entries = backend.optimizer.state.values()
    return [value.clone() for entry in entries for value in entry.values() if isinstance(value, torch.Tensor)]


# --- float16


def test_float16_computes_in_half_precision_and_keeps_float32_weights(model: Path) -> None:
    backend, exact = loaded(model, **FP16), loaded(model)
    ours, theirs = (b.log_probs([one_batch()], "actor", entropy=True)[0] for b in (backend, exact))
    assert not torch.equal(ours.log_probs, theirs.log_probs)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=0.03)
    assert ours.log_probs.dtype == ours.entropy.dtype == torch.float32
    result, reference = step(backend), step(exact)
    assert result.grad_norm == pytest.approx(reference.grad_norm, rel=0.01)  # of gradients without the scale
    assert (result.loss_scale, reference.loss_scale) == (65536.0, None)
    assert all(parameter.dtype == torch.float32 for parameter in backend.models["actor"].parameters())


def test_logits_of_float16_are_not_rounded(model: Path) -> None:
    backend = loaded(model, **FP16, share_prompts=False)
    seen: list[torch.Tensor] = []
    head = backend.models["actor"].lm.get_output_embeddings()
    backend.models["actor"].lm.get_decoder().norm.register_forward_hook(lambda *args: seen.append(args[-1].double()))
    batch = one_batch()
    ours = backend.log_probs([batch], "actor", entropy=False)[0].log_probs
    weight = head.weight.full_tensor().half().double()
    hidden = seen[0][0]
    expected = (hidden[batch.target_index - 1] @ weight.T).log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
def test_the_scale_changes_nothing_of_a_step(model: Path, clip_grad: float) -> None:
    """Products of powers of two are exact, as long as nothing under- or overflows."""
    weights = []
    for scale in (256.0, 2048.0):
        backend = loaded(model, **FP16, initial_loss_scale=scale, clip_grad=clip_grad)
        step(backend)
        weights.append(full_weights(backend))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=2e-4, msg=name)


def test_a_gradient_that_overflows_skips_its_step_and_halves_the_scale(model: Path) -> None:
    backend = loaded(model, **FP16, initial_loss_scale=2.0**24)
    step(backend, lambda *args: LossOutput(likelihood(*args).loss * 2.0**-20, {}))  # small enough: moments exist
    weights, state = full_weights(backend), state_of(backend)
    result = step(backend)
    assert (result.skipped, result.overflowed, result.loss_scale) == (True, True, 2.0**24)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in full_weights(backend).items())
    assert all(torch.equal(*pair) for pair in zip(state_of(backend), state, strict=True))
    assert backend.loss_scale.value == 2.0**23
    assert backend.num_steps == 2
    results = [step(backend) for _ in range(16)]
    assert not results[-1].skipped
    assert [r.loss_scale for r in results if r.overflowed] == [2.0 ** (23 - i) for i in range(7)][
        : sum(r.overflowed for r in results)
    ]


def test_overflows_do_not_count_as_skipped_steps(model: Path, tmp_path: Path) -> None:
    args = settings_for(model, **FP16, initial_loss_scale=2.0**30, max_skipped_steps=0)
    backend = make_backend(args)
    backend.load()
    recipe = make_recipe(backend, args, tmp_path)
    metrics = [recipe.train(rollout_id, random_batch(seed=rollout_id)) for rollout_id in range(4)]
    assert [m["train/overflowed_steps"] for m in metrics] == [1, 1, 1, 1]
    assert [m["train/skipped_steps"] for m in metrics] == [0, 0, 0, 0]
    assert [m["train/loss_scale"] for m in metrics] == [2.0**30, 2.0**29, 2.0**28, 2.0**27]
    assert recipe.num_skipped == 0
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_counts_and_leaves_the_scale(model: Path) -> None:
    backend = loaded(model, **FP16)
    nan = torch.tensor(float("nan"))
    result = step(backend, lambda *args: LossOutput(likelihood(*args).loss + nan, {}))
    assert (result.skipped, result.overflowed) == (True, False)
    assert backend.loss_scale.value == 65536.0


def test_the_scale_grows_after_a_window_without_overflow_and_never_falls_below_one() -> None:
    scale = LossScale(4.0, window=3)
    values = []
    for overflowed in (False, False, False, True, False, False, True, True, True):
        overflowed = overflowed and scale.explains(loss=1.0, grad_norm=float("inf"))
        scale.update(overflowed=overflowed)
        values.append(scale.value)
    assert values == [4, 4, 8, 4, 4, 4, 2, 1, 1]
    assert not scale.explains(loss=1.0, grad_norm=float("nan"))  # a step that is skipped now is counted
    still = LossScale()
    still.update(overflowed=False)
    assert still.value == 1.0


def test_a_checkpoint_brings_the_loss_scale_back(model: Path, tmp_path: Path) -> None:
    backend = loaded(model, **FP16, initial_loss_scale=1024.0, loss_scale_window=3, save=str(tmp_path))
    for _ in range(4):
        step(backend)
    backend.save(0)
    again = loaded(model, **FP16, loss_scale_window=3, load=str(tmp_path))
    assert (again.loss_scale.value, again.loss_scale.num_good) == (2048.0, 1)
    assert loaded(model, load=str(tmp_path)).loss_scale.value == 1.0
    for _ in range(2):
        ours, theirs = step(again), step(backend)
        assert ours == theirs
    assert again.loss_scale.value == 4096.0


def two_ranks_in_float16(model: Path, out: Path) -> None:
    """Overflows, then steps; the scale at every step."""
    backend = loaded(model, **FP16, initial_loss_scale=2.0**27, actor_num_gpus_per_node=dist.get_world_size())
    results = []
    for seed in range(12):
        batch = random_batch(seed=seed)
        weights = batch.loss_mask / batch.loss_mask.sum()
        rows = range(dist.get_rank(), len(batch), dist.get_world_size())
        results.append(backend.train_step([pack_rows(batch, rows, weights)], likelihood, wants=Wants()))
    weights = full_weights(backend)
    (out / f"rank{dist.get_rank()}of{dist.get_world_size()}.json").write_text(
        json.dumps([[r.loss_scale, r.overflowed, r.grad_norm] for r in results])
    )
    torch.save(weights, out / f"rank{dist.get_rank()}of{dist.get_world_size()}.pt")


def test_ranks_agree_on_what_overflowed(model: Path, tmp_path: Path) -> None:
    two_ranks_in_float16(model, tmp_path)
    run_ranks(two_ranks_in_float16, 2, model, tmp_path, store=tmp_path / "store")
    one, first, second = (json.loads((tmp_path / f"rank{name}.json").read_text()) for name in ("0of1", "0of2", "1of2"))
    assert first == second
    assert any(overflowed for _, overflowed, _ in first)
    assert not first[-1][1]
    assert first[-1][2] == pytest.approx(one[-1][2], rel=0.05)
    ranks = [torch.load(tmp_path / f"rank{rank}of2.pt") for rank in (0, 1)]
    assert all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items())


def test_one_precision_is_chosen(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--bf16 must be left out with --fp16, got True"):
        settings_for(model, fp16=True, bf16=True)


# --- which parameters


def moved(backend: FSDPBackend, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in full_weights(backend).items() if not torch.equal(tensor, before[name])}


def trained_names(backend: FSDPBackend) -> set[str]:
    names = {id(parameter): name for name, parameter in backend.models["actor"].lm.named_parameters()}
    return {names[id(parameter)] for group in backend.optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize(
    ("settings", "is_trained"),
    [
        (
            {"only_train_params_name_list": [r"layers\.1\..*_proj", "^lm_head"]},
            lambda n: ("layers.1." in n and "_proj" in n) or n.startswith("lm_head"),
        ),
        (
            {"freeze_params_name_list": ["embed_tokens", r"layers\.0\."]},
            lambda n: "embed_tokens" not in n and "layers.0." not in n,
        ),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_parameters_meant_are_trained(
    model: Path, settings: dict[str, Any], is_trained: Any, checkpointing: bool
) -> None:
    backend = loaded(model, **settings, gradient_checkpointing=checkpointing, weight_decay=0.1)
    before = full_weights(backend)
    wanted = {name for name in before if is_trained(name)}
    gradients: list[str] = []
    backend.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(n for n, p in backend.models["actor"].lm.named_parameters() if p.grad is not None)
    )
    step(backend)
    assert 0 < len(wanted) < len(before)
    assert moved(backend, before) == trained_names(backend) == set(gradients) == wanted
    assert len(backend.optimizer.state) == len(wanted)


def test_what_is_trained_moves_as_if_all_were(model: Path) -> None:
    part, whole = loaded(model, freeze_params_name_list=["embed"], clip_grad=0.0), loaded(model, clip_grad=0.0)
    step(part)
    step(whole)
    for name, tensor in full_weights(whole).items():
        if "embed" not in name:
            torch.testing.assert_close(tensor, full_weights(part)[name], rtol=0, atol=1e-6)


def test_a_checkpoint_of_a_run_with_frozen_parameters_goes_on(model: Path, tmp_path: Path) -> None:
    settings = {"freeze_params_name_list": [r"layers\.0\.", "embed"], "save": str(tmp_path)}
    backend = loaded(model, **settings)
    step(backend)
    backend.save(0)
    again = loaded(model, **settings, load=str(tmp_path))
    for candidate in (backend, again):
        step(candidate, seed=1)
    assert moved(again, full_weights(backend)) == set()
    assert trained_names(again) == trained_names(backend)


def test_patterns_that_match_nothing_or_leave_nothing_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"--freeze-params-name-list attn\\.query matches none of model\.embed_tokens"):
        loaded(model, freeze_params_name_list=[r"attn\.query"])
    with pytest.raises(ValueError, match=r"--freeze-params-name-list \. leaves no parameter to train"):
        loaded(model, freeze_params_name_list=["."])
    with pytest.raises(ConfigError, match=r"--only-train-params-name-list must be regular expressions, got '\(x'"):
        settings_for(model, only_train_params_name_list=["(x"])
    with pytest.raises(ConfigError, match=r"--freeze-params-name-list must be left out where --only-train"):
        settings_for(model, only_train_params_name_list=["x"], freeze_params_name_list=["y"])


def test_the_optimizer_forgets_at_the_start_of_each_rollout_where_it_shall(model: Path) -> None:
    for resets, expected in ((False, [1, 2, 3, 4]), (True, [1, 2, 1, 2])):
        backend = loaded(model, reset_optimizer_states=resets, num_steps_per_rollout=2)
        counts = []
        for seed in range(4):
            step(backend, seed=seed)
            counts.append({float(entry["step"]) for entry in backend.optimizer.state.values()})
        assert counts == [{count} for count in expected]
