"""Models beside the actor: copies of it, and a teacher; and the logits that a loss may ask for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import plain_grpo
from helpers.tiny_models import make_tiny_model
from helpers.training import make_backend, random_samples, run_ranks, settings_for

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.fsdp_utils.model import empty_like, load_causal_lm
from slime.backends.shared.checkpoint import CheckpointError
from slime.data.batch import batch_from_samples
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, ModelTag, TokenOutputs, Wants

REFERENCE = {"use_kl_loss": True, "kl_loss_coef": 0.1}


def one_batch(*, seed: int = 0, rows: Any = None) -> PackedBatch:
    samples = random_samples(seed=seed)
    batch = batch_from_samples(samples, [0.0] * len(samples))
    return pack_rows(batch, range(len(batch)) if rows is None else rows, batch.loss_mask / batch.loss_mask.sum())


def likelihood(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
    return LossOutput(-(batch.loss_weights * outputs.log_probs).sum(), {})


def loaded(model: Path, **settings: Any) -> FSDPBackend:
    backend = make_backend(settings_for(model, **settings))
    backend.load()
    return backend


def step(backend: FSDPBackend, seed: int = 0) -> None:
    mine = range(backend.layout.data_rank, 8, backend.layout.data_size)
    backend.train_step([one_batch(seed=seed, rows=mine)], likelihood, wants=Wants())


def log_probs(backend: FSDPBackend, tag: ModelTag) -> torch.Tensor:
    return backend.log_probs([one_batch()], tag, entropy=True)[0].log_probs


# --- copies


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("qwen3", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3_moe", {}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_a_copy_that_is_made_says_the_same_and_stays_when_the_actor_moves(
    architecture: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    backend = loaded(make_tiny_model(tmp_path, architecture, **overrides))
    step(backend)
    random_state = torch.get_rng_state()
    backend.copy_weights("actor", "old_actor")
    assert torch.equal(torch.get_rng_state(), random_state)
    before = log_probs(backend, "actor")
    assert torch.equal(log_probs(backend, "old_actor"), before)
    assert not any(parameter.requires_grad for parameter in backend.models["old_actor"].parameters())
    step(backend, seed=1)
    assert torch.equal(log_probs(backend, "old_actor"), before)
    assert not torch.equal(log_probs(backend, "actor"), before)


def test_a_copy_follows_even_where_the_target_was_just_used(model: Path, other_model: Path) -> None:
    """After a forward FSDP may hold gathered parameters, which a copy of the shards would not reach."""
    backend = loaded(model, ref_load=str(other_model), load=str(model), **REFERENCE)
    assert not torch.equal(log_probs(backend, "ref"), log_probs(backend, "actor"))
    for seed in range(2):
        step(backend, seed)
        backend.copy_weights("actor", "ref")
        assert torch.equal(log_probs(backend, "ref"), log_probs(backend, "actor"))


def test_a_copy_of_another_shape_is_refused_by_tensor(model: Path, tmp_path: Path) -> None:
    wider = make_tiny_model(tmp_path, intermediate_size=96)
    backend = loaded(model, ref_load=str(wider), load=str(model), **REFERENCE)
    with pytest.raises(ValueError, match=r"actor to ref: tensor .*mlp\.\w+_proj\.weight has shapes \(.*\) and \("):
        backend.copy_weights("actor", "ref")


def test_an_empty_model_keeps_tied_weights_tied(tmp_path: Path) -> None:
    for tied in (True, False):
        lm = load_causal_lm(str(make_tiny_model(tmp_path, tie_word_embeddings=tied)), attn_implementation="packed")
        twin = empty_like(lm)
        assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) is tied
        assert twin.config is not lm.config
        assert [name for name, _ in twin.named_parameters()] == [name for name, _ in lm.named_parameters()]


# --- copies in checkpoints


def run_with_copies(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint in the middle; what reference, old actor and actor say at the end."""
    backend = loaded(model, save=str(folder), keep_old_actor=True, **REFERENCE)
    step(backend)
    backend.copy_weights("actor", "ref")
    step(backend, seed=1)
    backend.copy_weights("actor", "old_actor")
    step(backend, seed=2)
    backend.save(0)
    return continued(backend)


def continued(backend: FSDPBackend) -> dict[str, torch.Tensor]:
    tags: list[ModelTag] = ["ref", "old_actor", "actor"]
    says = {f"{tag} at the checkpoint": log_probs(backend, tag) for tag in tags}
    step(backend, seed=3)
    return says | {f"{tag} after it": log_probs(backend, tag) for tag in tags}


def resumed(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    backend = loaded(model, load=str(folder), keep_old_actor=True, **REFERENCE)
    assert backend.copies == {"ref", "old_actor"}  # the next checkpoint has them too
    return continued(backend)


def two_rank_body(model: Path, work: Path) -> None:
    results = {"run": run_with_copies(model, work), "resumed": resumed(model, work)}
    if dist.get_rank() == 0:
        torch.save(results, work / "two.pt")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def test_copies_come_back_from_a_checkpoint_bit_for_bit(model: Path, tmp_path: Path) -> None:
    says = run_with_copies(model, tmp_path)
    assert len({tuple(tensor.tolist()) for tensor in says.values()}) == 4  # only the actor moved on
    same(resumed(model, tmp_path), says)


def test_two_ranks_copy_save_and_resume_as_one(model: Path, tmp_path: Path) -> None:
    run_ranks(two_rank_body, 2, model, tmp_path, store=tmp_path / "store")
    two = torch.load(tmp_path / "two.pt")
    same(two["resumed"], two["run"])
    for name, tensor in run_with_copies(model, tmp_path / "one").items():
        torch.testing.assert_close(two["run"][name], tensor, rtol=0, atol=1e-3, msg=name)
    # and what two have saved one can load
    torch.testing.assert_close(resumed(model, tmp_path)["ref after it"], two["run"]["ref after it"], rtol=0, atol=1e-5)


def test_a_checkpoint_holds_no_copy_that_was_never_made(model: Path, tmp_path: Path) -> None:
    backend = loaded(model, save=str(tmp_path), **REFERENCE)
    backend.save(0)
    assert sorted(path.name for path in (tmp_path / "iter_0000000").iterdir() if path.is_dir()) == [
        "model",
        "optimizer",
    ]


def test_a_run_without_a_reference_passes_over_one_in_the_checkpoint(model: Path, tmp_path: Path) -> None:
    run_with_copies(model, tmp_path)
    assert loaded(model, load=str(tmp_path)).models.keys() == {"actor"}
    fresh = loaded(model, load=str(tmp_path), finetune=True, **REFERENCE)
    assert torch.equal(log_probs(fresh, "ref"), log_probs(loaded(model), "actor"))


# --- teacher


def distilled(model: Path, teacher: Path, **settings: Any) -> FSDPBackend:
    return loaded(model, use_opd=True, opd_teacher_load=str(teacher), **settings)


def test_a_teacher_may_be_a_larger_model_with_padded_embeddings(model: Path, tmp_path: Path) -> None:
    teacher = make_tiny_model(tmp_path, num_hidden_layers=3, hidden_size=96, vocab_size=384)
    expected = log_probs(loaded(teacher), "actor")
    assert torch.equal(log_probs(distilled(model, teacher), "teacher"), expected)


def test_a_teacher_may_be_a_step_of_a_checkpoint(model: Path, other_model: Path, tmp_path: Path) -> None:
    source = loaded(other_model, save=str(tmp_path))
    for rollout_id in range(2):
        source.save(rollout_id)
        step(source)
    newest = distilled(model, tmp_path)
    assert torch.equal(
        log_probs(distilled(model, tmp_path, opd_teacher_ckpt_step=0), "teacher"),
        log_probs(loaded(other_model), "actor"),
    )
    assert not torch.equal(log_probs(newest, "teacher"), log_probs(loaded(other_model), "actor"))
    with pytest.raises(CheckpointError, match=f"--opd-teacher-load {tmp_path}/none holds neither a model nor a checkp"):
        distilled(model, tmp_path / "none")


def test_a_teacher_of_another_vocabulary_is_refused_with_both_sizes(model: Path, tmp_path: Path) -> None:
    teacher = make_tiny_model(tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match=r"the student's vocabulary: .* has 310 tokens, the teacher .* 300"):
        distilled(model, teacher)
    for path in teacher.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has 320 tokens, the teacher .* 300"):  # by the models, then
        distilled(model, teacher)


def test_a_teacher_that_means_other_tokens_is_refused_by_token(model: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(model, tmp_path / "teacher")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"the student's tokenizer: token \d+ is '[!#]' in .*, not in "):
        distilled(model, teacher)


# --- logits


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_loss_that_asks_for_logits_has_them_whole_and_with_gradient(model: Path, temperature: float) -> None:
    backend = loaded(model, rollout_temperature=temperature)
    samples = random_samples()
    plain = plain_grpo.load(model)
    seen: list[TokenOutputs] = []
    gradients: dict[str, torch.Tensor] = {}
    factor = torch.linspace(-1, 1, 320)

    def loss(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
        seen.append(outputs)
        assert outputs.logits is not None
        return LossOutput((outputs.logits * factor).sum() / 1000, {})

    def note(*_: Any) -> None:
        gradients.update({n: p.grad.full_tensor() for n, p in backend.models["actor"].named_parameters()})

    backend.optimizer.register_step_pre_hook(note)
    result = backend.train_step([one_batch()], loss, wants=Wants(entropy=True, logits=True))
    (outputs,) = seen
    assert outputs.logits.dtype == torch.float32
    expected = torch.cat(
        [
            plain(input_ids=torch.tensor([sample.tokens]), use_cache=False).logits[0, -sample.response_length - 1 : -1]
            for sample in samples
        ]
    )
    expected = expected / temperature
    torch.testing.assert_close(outputs.logits.double(), expected, rtol=0, atol=1e-4)
    chunked = loaded(model, rollout_temperature=temperature).log_probs([one_batch()], "actor", entropy=True)[0]
    torch.testing.assert_close(outputs.log_probs, chunked.log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.entropy, chunked.entropy, rtol=0, atol=1e-6)
    ((expected * factor.double()).sum() / 1000).backward()
    scale = result.grad_norm / backend.run.clip_grad if result.grad_norm > backend.run.clip_grad else 1.0
    for name, parameter in plain.named_parameters():
        ours = gradients[f"lm.{name}"].double() * scale
        assert (ours - parameter.grad).norm() < 1e-4 * max(float(parameter.grad.norm()), 1e-2), name


def test_without_being_asked_for_there_are_no_logits(model: Path) -> None:
    assert loaded(model).log_probs([one_batch()], "actor", entropy=True)[0].logits is None
