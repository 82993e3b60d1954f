"""Each estimator through the recipe: the maths itself has its oracles in tests/algorithms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import full_weights, make_backend, make_recipe, random_samples, run_ranks, settings_for

from slime.config import AlgorithmConfig, ConfigError
from slime.config.algorithm import ESTIMATORS as NAMES
from slime.data.batch import TrainBatch, batch_from_samples
from slime.training.estimators import ESTIMATORS, estimator_of

STEADY = {"adam_eps": 1e-4, "lr": 1e-3}
KL = {"kl_coef": 0.2}
# Settings that make each estimator use all that it has.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "gspo": {"eps_clip": 0.01},
    "cispo": {"eps_clip": 1.0, "eps_clip_high": 0.1},
    "rloo": {},
    "dr_grpo": {"rollout_max_response_len": 20},
    "reinforce_plus_plus": {"gamma": 0.9, "normalize_advantages": True} | KL,
    "reinforce_plus_plus_baseline": {"normalize_advantages": True} | KL,
    "ppo": {"gamma": 0.95, "lambd": 0.8, "eps_clip_c": 1.5},
    "on_policy_distillation": {},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "grpo+tis": {"use_tis": True, "tis_clip": 1.5, "tis_clip_low": 0.1},
    "grpo+mis": {
        "use_tis": True,
        "tis_level": "geometric",
        "tis_mode": "mask",
        "tis_rs_level": "token",
        "tis_veto": 1e-4,
    },
    "grpo+opsm": {"use_opsm": True, "opsm_delta": 1e-6, "num_steps_per_rollout": 2},
    "grpo+opd": {"use_opd": True, "opd_kl_coef": 0.3},
    "grpo+unbiased_kl": {"use_kl_loss": True, "kl_loss_coef": 0.2, "use_unbiased_kl": True},
    "gspo+whitened": {"normalize_advantages": True, "eps_clip": 0.01},
}
ALL = CASES | EXTRAS


def batch_of(group_sizes: tuple[int, ...] = (3, 1, 4)) -> TrainBatch:
    """Uneven groups; values and a teacher's log-probs as a critic and a teacher's engine would add them."""
    samples = random_samples(group_sizes=group_sizes, seed=5)
    generator = np.random.default_rng(1)
    for sample in samples:
        sample.teacher_log_probs = generator.uniform(-7, -4, sample.response_length).tolist()
    batch = batch_from_samples(samples, [float(sample.reward) for sample in samples])  # type: ignore[arg-type]
    values = generator.normal(size=len(batch.loss_mask)).astype(np.float32)
    object.__setattr__(batch, "values", values)
    return batch


def settings_of(case: str, other_model: Path) -> dict[str, Any]:
    settings = {"advantage_estimator": case.split("+")[0]} | ALL[case]
    return STEADY | settings | ({"ref_load": str(other_model)} if "kl" in str(settings) else {})


def train(
    model: Path, out: Path, batch: TrainBatch, **settings: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    args = settings_for(model, load=str(model), **settings)
    backend = make_backend(args)
    backend.load()
    return make_recipe(backend, args, out).train(0, batch), full_weights(backend)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_every_name_of_the_settings_has_an_entry_and_the_reverse() -> None:
    assert set(NAMES) == set(ESTIMATORS)


@pytest.mark.parametrize("case", ALL)
def test_packing_and_order_of_samples_change_nothing(case: str, model: Path, other_model: Path, tmp_path: Path) -> None:
    settings, batch = settings_of(case, other_model), batch_of()
    reference, weights = train(model, tmp_path, batch, **settings)
    assert reference["train/grad_norm"] > 0
    metrics, packed = train(model, tmp_path, batch, use_dynamic_batch_size=True, max_tokens_per_gpu=10_000, **settings)
    assert metrics == pytest.approx(reference, abs=2e-5, rel=1e-4)
    assert_close(packed, weights)
    if "num_steps_per_rollout" not in settings:  # else the steps hold other samples
        order = np.random.default_rng(0).permutation(len(batch))
        metrics, shuffled = train(model, tmp_path, batch.select(order), micro_batch_size=3, **settings)
        assert metrics == pytest.approx(reference, abs=2e-5, rel=1e-4)
        assert_close(shuffled, weights)


def two_rank_body(model: Path, other_model: Path, out: Path) -> None:
    for case in ALL:
        metrics, weights = train(model, out, batch_of(), **settings_of(case, other_model))
        if torch.distributed.get_rank() == 0:
            torch.save((metrics, weights), out / f"{case}.pt")


def test_two_ranks_train_as_one(model: Path, other_model: Path, tmp_path: Path) -> None:
    run_ranks(two_rank_body, 2, model, other_model, tmp_path, store=tmp_path / "store")
    for case in ALL:
        metrics, weights = train(model, tmp_path, batch_of(), **settings_of(case, other_model))
        theirs, their_weights = torch.load(tmp_path / f"{case}.pt")
        assert metrics == pytest.approx(theirs, abs=2e-5, rel=1e-4), case
        assert_close(weights, their_weights)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("ppo", "on_policy_distillation")])
def test_equal_rewards_teach_nothing(case: str, model: Path, other_model: Path, tmp_path: Path) -> None:
    samples = random_samples(group_sizes=(3, 1, 4))
    settings = settings_of(case, other_model) | {"kl_coef": 0.0, "gamma": 1.0}
    metrics, _ = train(model, tmp_path, batch_from_samples(samples, [1.0] * 8), **settings)
    assert metrics["train/grad_norm"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_masked_sample_changes_nothing_but_the_number_of_samples(
    case: str, model: Path, other_model: Path, tmp_path: Path
) -> None:
    """Its tokens may be anything: the update is the same."""
    settings = settings_of(case, other_model)
    results = []
    for token in (3, 9):
        batch = batch_of()
        ends = np.cumsum(batch.total_lengths)
        batch.tokens[ends[1] - batch.response_lengths[1] : ends[1]] = token
        batch.loss_mask[batch.response_lengths[0] : batch.response_lengths[0] + batch.response_lengths[1]] = 0
        results.append(train(model, tmp_path, batch, **settings)[1])
    assert_close(*results)


def test_an_estimator_outside_the_package_is_named_by_its_path(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = '''
from dataclasses import replace
from slime.training.estimators import ESTIMATORS

def scores(rewards, group_ids, cfg):
    """Best of the rollout against the rest."""
    return cfg.prize * (rewards == rewards.max()).float()

ESTIMATOR = replace(ESTIMATORS["grpo"], scores=scores)
'''
    (tmp_path / "my_algorithm.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    batch = batch_of()
    own = {"advantage_estimator": "my_algorithm.ESTIMATOR", "plugin_settings": {"prize": 3.0}}
    metrics, _ = train(model, tmp_path, batch, **own, **STEADY)
    assert metrics["rollout/rewards"] == pytest.approx(3 * (batch.rewards == batch.rewards.max()).mean())
    with pytest.raises(ValueError, match="my_algorithm.scores must be a slime.training.estimators.Estimator"):
        estimator_of(AlgorithmConfig(advantage_estimator="my_algorithm.scores"))
    with pytest.raises(ConfigError, match="--advantage-estimator must be one of grpo, .* got 'grop'"):
        AlgorithmConfig(advantage_estimator="grop")


def test_fan_out_siblings_count_as_one_sample(model: Path, tmp_path: Path) -> None:
    """A rollout in two halves weighs as much as one in a piece."""
    samples = random_samples(group_sizes=(4,), masks=False)
    for sample, rollout_id in zip(samples, (5, 5, 6, 7), strict=True):
        sample.rollout_id = rollout_id
    rewards = [1.0, 3.0, -2.0, 0.5]
    batch = batch_from_samples(samples, rewards, rewards_are_final=True)
    metrics, _ = train(model, tmp_path, batch, rollout_batch_size=2, **STEADY)
    lengths = [sample.response_length for sample in samples]
    pair = (rewards[0] * lengths[0] + rewards[1] * lengths[1]) / (lengths[0] + lengths[1])
    assert metrics["train/pg_loss"] == pytest.approx(-(pair + rewards[2] + rewards[3]) / 3, rel=1e-5)


PLUGINS = """
import torch

def loss(args, batch, logits, sum_of_sample_mean):
    tokens = torch.cat([t[-n:] for t, n in zip(batch["tokens"], batch["response_lengths"])])
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    value = sum_of_sample_mean(-log_probs)
    return value, {"nll": value}

def advantages(args, rollout_data):
    scores = zip(rollout_data["rewards"], rollout_data["response_lengths"])
    rollout_data["advantages"] = [score * torch.ones(length) for score, length in scores]
    rollout_data["returns"] = rollout_data["advantages"]

def entropies(args, rollout_data):
    rollout_data["advantages"] = rollout_data["returns"] = rollout_data["entropy"]

def no_advantages(args, rollout_data):
    pass

def twofold(args, rollout_id, rollout_data):
    assert rollout_id == 0 and len(rollout_data["tokens"]) == 8
    rollout_data["advantages"] = [2 * advantages for advantages in rollout_data["advantages"]]

def too_few(args, rollout_id, rollout_data):
    rollout_data["advantages"] = [advantages[:1] for advantages in rollout_data["advantages"]]

def reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    masks = torch.cat(loss_masks)
    return lambda values: (values * masks).sum() / 10

def tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **kw):
    half = [mask * 0 if i % 2 else mask for i, mask in enumerate(loss_masks)]
    return pg_loss, half, {"kept": torch.cat(half)}
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"training_plugins_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_custom_loss_of_the_likelihood_is_sft(plugins: str, model: Path, tmp_path: Path) -> None:
    samples = random_samples(group_sizes=(3, 1, 4))
    batch = batch_from_samples(samples, [1.0] * 8)
    common: dict[str, Any] = {"num_steps_per_rollout": 2, "rollout_temperature": 0.8} | STEADY
    metrics, weights = train(
        model, tmp_path, batch, loss_type="custom_loss", custom_loss_function_path=f"{plugins}.loss", **common
    )
    expected, sft_weights = train(model, tmp_path, batch, loss_type="sft_loss", **common)
    assert metrics["train/nll"] == pytest.approx(expected["train/loss"], rel=1e-5)
    assert_close(weights, sft_weights)


def test_a_custom_advantage_function_sets_advantages(plugins: str, model: Path, tmp_path: Path) -> None:
    batch = batch_of()
    ours = train(model, tmp_path, batch, custom_advantage_function_path=f"{plugins}.advantages", **STEADY)
    plain = train(model, tmp_path, batch, num_steps_per_rollout=1, **STEADY)
    assert ours[0]["train/pg_loss"] == pytest.approx(plain[0]["train/pg_loss"], rel=1e-5)
    assert_close(ours[1], plain[1])
    with pytest.raises(ValueError, match=r"did not set rollout_data\['advantages'\]"):
        train(model, tmp_path, batch, custom_advantage_function_path=f"{plugins}.no_advantages")


def test_the_old_policy_s_entropy_reaches_an_advantage_function(plugins: str, model: Path, tmp_path: Path) -> None:
    path = f"{plugins}.entropies"
    settings = {"custom_advantage_function_path": path, "use_rollout_entropy": True} | STEADY
    metrics, _ = train(model, tmp_path, batch_of(), num_steps_per_rollout=1, **settings)
    assert metrics["rollout/advantages"] == metrics["rollout/entropy"]
    assert metrics["rollout/entropy"] == pytest.approx(metrics["train/entropy_loss"], rel=1e-5)


def test_a_postprocess_of_the_rollout_data_changes_what_is_trained_on(
    plugins: str, model: Path, tmp_path: Path
) -> None:
    batch = batch_of()
    common: dict[str, Any] = {"micro_batch_size": 3, "num_steps_per_rollout": 1} | STEADY
    plain, _ = train(model, tmp_path, batch, **common)
    double, _ = train(model, tmp_path, batch, rollout_data_postprocess_path=f"{plugins}.twofold", **common)
    assert double["rollout/advantages"] == pytest.approx(2 * plain["rollout/advantages"], rel=1e-5)
    assert double["train/grad_norm"] == pytest.approx(2 * plain["train/grad_norm"], rel=1e-4)
    with pytest.raises(ValueError, match=r"too_few: rollout_data\['advantages'\] must have one value a response token"):
        train(model, tmp_path, batch, rollout_data_postprocess_path=f"{plugins}.too_few", **common)


def test_a_custom_reducer_replaces_the_mean_of_the_policy_loss(plugins: str, model: Path, tmp_path: Path) -> None:
    batch = batch_of()
    metrics, _ = train(
        model, tmp_path, batch, custom_pg_loss_reducer_function_path=f"{plugins}.reducer", micro_batch_size=3, **STEADY
    )
    scores = ESTIMATORS["grpo"].scores(torch.tensor(batch.rewards), torch.tensor(batch.group_ids), AlgorithmConfig())
    lengths = np.add.reduceat(batch.loss_mask, np.cumsum(batch.response_lengths) - batch.response_lengths)
    assert metrics["train/pg_loss"] == pytest.approx(-float((scores.numpy() * lengths).sum()) / 10 / 8, rel=1e-4)


def test_a_custom_tis_function_masks_and_reports(plugins: str, model: Path, tmp_path: Path) -> None:
    batch = batch_of()
    metrics, _ = train(
        model,
        tmp_path,
        batch,
        use_tis=True,
        custom_tis_function_path=f"{plugins}.tis",
        micro_batch_size=2,
        balance_data=False,
        **STEADY,
    )
    assert 0 < metrics["train/kept"] < 1


def test_distillation_without_a_teacher_says_how_to_get_one(model: Path, tmp_path: Path) -> None:
    batch = batch_from_samples(random_samples(), [1.0] * 8)
    with pytest.raises(ValueError, match="distillation needs teacher_log_probs .* --opd-teacher-load"):
        train(model, tmp_path, batch, advantage_estimator="on_policy_distillation")
