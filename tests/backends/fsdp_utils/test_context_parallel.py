"""Context parallelism: whatever ranks share the tokens, they train as one rank does. See `computed`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, make_recipe, random_batch, run_ranks, settings_for

from slime.arguments import Args
from slime.backends.fsdp_utils.arguments import FSDPConfig, check_context_parallel
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.fsdp_utils.context_parallel import ContextGroup
from slime.backends.fsdp_utils.prompt_sharing import Sharing
from slime.backends.fsdp_utils.sources import critic_run
from slime.config import ConfigError
from slime.data.batch import TrainBatch
from slime.data.packed import pack_rows
from slime.training.critic import CriticRecipe
from slime.training.plan import whole_batch

STEADY = {"adam_eps": 1e-4, "lr": 1e-3}
SFT = {"rollout_function_path": "slime.rollout.sft_rollout.generate_rollout", "loss_type": "sft_loss"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("qwen3", {}),  # 4 query heads, 2 of keys and values
    "odd_kv": ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "all_kv": ("llama", {"num_key_value_heads": 4}),
    "window": ("mistral", {"sliding_window": 5}),
    "moe": ("qwen3_moe", {}),
    "mla": ("deepseek_v3", {}),  # values narrower than keys
}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 50, "num_steps_per_rollout": 2},
    "apart": {"micro_batch_size": 8, "share_prompts": False, "use_kl_loss": True, "kl_loss_coef": 0.1},
    "gspo": {"model": "odd_kv", "advantage_estimator": "gspo", "num_steps_per_rollout": 2, "entropy_coef": 0.1},
    "mis": {"model": "all_kv", "use_tis": True, "tis_level": "sequence", "gradient_checkpointing": True},
    "whitened": {"model": "window", "advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True},
    "one_sample": {"model": "mla", "rewards_normalization": False, "only_row": 3},
    "sft": {"model": "moe", "micro_batch_size": 3} | SFT,
    "logits": {"loss_type": "custom_loss", "custom_loss_function_path": f"{__name__}.likelihood"},
    "critic": {"advantage_estimator": "ppo", "critic_lr": 1e-2, "micro_batch_size": 2},
}


def likelihood(args: Any, batch: dict[str, Any], logits: torch.Tensor, sum_of_sample_mean: Any) -> Any:
    """A loss that reads whole samples and all logits: of the tokens they have, weighted by where they stand."""
    targets = torch.cat([t[-n:] for t, n in zip(batch["tokens"], batch["response_lengths"], strict=True)])
    places = torch.cat([torch.arange(1, n + 1) for n in batch["response_lengths"]])
    picked = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    loss = -sum_of_sample_mean(picked * places / 10)
    return loss, {"places": sum_of_sample_mean(places.float())}


def case_backend(name: str, models: Path, size: int) -> tuple[FSDPBackend, Args]:
    settings = STEADY | CASES[name] | {"context_parallel_size": size, "actor_num_gpus_per_node": size}
    settings.pop("only_row", None)
    args = settings_for(models / str(settings.pop("model", "grouped")), **settings)
    is_critic = name == "critic"
    run = critic_run(args) if is_critic else args
    backend = FSDPBackend(run, args, torch.device("cpu"), role="critic" if is_critic else "actor")
    backend.load()
    return backend, args


def noted_gradients(backend: FSDPBackend) -> list[dict[str, torch.Tensor]]:
    """The gradients of every parameter at each optimizer step to come."""
    steps: list[dict[str, torch.Tensor]] = []

    def note(*_: Any) -> None:
        named = backend.models[backend.role].named_parameters()
        steps.append({name: p.grad.full_tensor().clone() for name, p in named if p.grad is not None})

    backend.optimizer.register_step_pre_hook(note)
    return steps


def forward(backend: FSDPBackend, batch: TrainBatch) -> dict[str, torch.Tensor]:
    """What a forward without gradient says of the response tokens of `batch`, in its order."""
    rows = range(backend.layout.data_rank, len(batch), backend.layout.data_size)
    pack = pack_rows(batch, rows, batch.loss_mask)
    (outputs,) = backend.log_probs([pack], backend.role, entropy=True)
    given = {name: value for name, value in vars(outputs).items() if value is not None}
    return {name: torch.from_numpy(whole_batch(backend, batch, [(pack, value)])) for name, value in given.items()}


def train(backend: FSDPBackend, args: Args, rollout_id: int, batch: TrainBatch, out: Path) -> dict[str, float]:
    if backend.role == "actor":
        return make_recipe(backend, args, out).train(rollout_id, batch)
    recipe = CriticRecipe(backend, args, backend.run, lambda name: contextlib.nullcontext())
    return recipe.train(rollout_id, batch).metrics


def run_case(name: str, models: Path, out: Path, size: int) -> None:
    """Two rollouts; rank 0 writes all there is to compare to `out`."""
    backend, args = case_backend(name, models, size)
    gradients = noted_gradients(backend)
    rows = [CASES[name]["only_row"]] if "only_row" in CASES[name] else range(8)
    batches = [random_batch(seed=seed, group_sizes=(3, 1, 4)).select(rows) for seed in range(2)]
    found: dict[str, Any] = {"outputs": forward(backend, batches[0])}
    found["metrics"] = [train(backend, args, number, batch, out) for number, batch in enumerate(batches)]
    found |= {"gradients": gradients, "later_outputs": forward(backend, batches[0])}
    if name != "critic":
        found["weights"] = full_weights(backend)
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        torch.save(found, out / f"{name}.pt")


def interrupted(models: Path, folder: Path, size: int) -> None:
    """A rollout, a checkpoint, another rollout; the last weights as `weights.pt`."""
    args = settings_for(models / "grouped", save=str(folder), context_parallel_size=size, actor_num_gpus_per_node=size)
    backend = make_backend(args)
    backend.load()
    train(backend, args, 0, random_batch(seed=0), folder)
    backend.save(0)
    train(backend, args, 1, random_batch(seed=1), folder)
    write_weights(backend, folder / "weights.pt")


def resumed(models: Path, folder: Path, size: int, out: Path) -> None:
    """The second rollout again, from the checkpoint in `folder`."""
    args = settings_for(models / "grouped", load=str(folder), context_parallel_size=size, actor_num_gpus_per_node=size)
    backend = make_backend(args)
    assert backend.load() == 1
    train(backend, args, 1, random_batch(seed=1), folder)
    write_weights(backend, out)


def write_weights(backend: FSDPBackend, path: Path) -> None:
    weights = full_weights(backend)
    if dist.get_rank() == 0:
        torch.save(weights, path)


def rank_body(models: Path, work: Path, size: int, cases: tuple[str, ...]) -> None:
    for name in cases:
        run_case(name, models, work / f"{dist.get_world_size()}_{size}", size)


def two_rank_body(models: Path, work: Path) -> None:
    rank_body(models, work, 2, tuple(CASES))
    interrupted(models, work / "saved_by_two", 2)
    resumed(models, work / "saved_by_one", 2, work / "resumed_by_two.pt")


def four_rank_body(models: Path, work: Path) -> None:
    for size in (2, 4):
        rank_body(models, work, size, tuple(CASES))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all models."""
    folder = tmp_path_factory.mktemp("models")
    for name, (architecture, fields) in MODELS.items():
        make_tiny_model(folder / name, architecture, **fields)
    return folder


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """The folder in which one rank, and two that share tokens, left what they computed."""
    work = tmp_path_factory.mktemp("ranks")
    rank_body(models, work, 1, tuple(CASES))
    interrupted(models, work / "saved_by_one", 1)
    run_ranks(two_rank_body, 2, models, work, store=work / "store")
    return work


@pytest.fixture(scope="module")
def computed_by_four(computed: Path, models: Path) -> Path:
    run_ranks(four_rank_body, 4, models, computed, store=computed / "store_of_four")
    return computed


def same(ours: Any, theirs: Any, what: str) -> None:
    """Equal at 1e-5, of each gradient relative to its norm."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), what
        for name, value in theirs.items():
            same(ours[name], value, f"{what} {name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), what
        for number, value in enumerate(theirs):
            same(ours[number], value, f"{what} {number}")
    elif isinstance(theirs, torch.Tensor):
        limit = 1e-5 * max(1.0, float(theirs.norm()))
        assert (ours - theirs).abs().max() < limit, f"{what}: {(ours - theirs).abs().max()}, at most {limit}"
    else:
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), what


def loads(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_tokens_train_as_one(name: str, computed: Path) -> None:
    same(loads(computed / "2_2" / f"{name}.pt"), loads(computed / "1_1" / f"{name}.pt"), name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_that_share_tokens_or_samples_too_train_as_one(name: str, size: int, computed_by_four: Path) -> None:
    same(loads(computed_by_four / f"4_{size}" / f"{name}.pt"), loads(computed_by_four / "1_1" / f"{name}.pt"), name)


def test_a_checkpoint_goes_on_at_another_context_size(computed: Path, models: Path) -> None:
    resumed(models, computed / "saved_by_two", 1, computed / "resumed_by_one.pt")
    same(loads(computed / "resumed_by_one.pt"), loads(computed / "saved_by_two" / "weights.pt"), "saved by two")
    same(loads(computed / "resumed_by_two.pt"), loads(computed / "saved_by_one" / "weights.pt"), "saved by one")


# --- parts


def deal(sharing: Any, num_tokens: int, size: int) -> Any:
    group: Any = None  # it is not asked
    return ContextGroup(group, 0, size).deal(sharing, num_tokens)


def test_tokens_are_dealt_in_turn_and_a_place_left_over_repeats_the_first() -> None:
    dealt = deal(None, 5, 2)
    assert dealt.first.view(2, 3).tolist() == [[0, 2, 4], [1, 3, 0]]
    assert dealt.first[dealt.place].tolist() == [0, 1, 2, 3, 4]


def test_shared_tokens_are_dealt_once() -> None:
    sharing = Sharing(torch.tensor([0, 1, 2, 5]), torch.tensor([0, 1, 2, 0, 1, 3]))
    dealt = deal(sharing, 6, 2)
    assert dealt.first.view(2, 2).tolist() == [[0, 2], [1, 5]]
    assert dealt.first[dealt.place].tolist() == sharing.first[sharing.place].tolist()


def test_a_pack_of_fewer_tokens_than_ranks_leaves_none_without() -> None:
    assert deal(None, 2, 4).first.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("attn_implementation", "config", "message"),
    [
        ("sdpa", {}, "--context-parallel-size 3 needs --attn-implementation packed, got 'sdpa'."),
        ("packed", {"num_attention_heads": 8}, "--context-parallel-size 3 must divide the query heads of the model, g"),
        ("packed", {}, "got None heads"),
        (
            "packed",
            {"num_attention_heads": 6, "rope_scaling": {"type": "longrope"}},
            "--context-parallel-size 3: the model rotates positions by the longest sample (longrope): use 1.",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(attn_implementation: str, config: dict[str, Any], message: str) -> None:
    fsdp = FSDPConfig(attn_implementation=attn_implementation)
    with pytest.raises(ConfigError) as refusal:
        check_context_parallel(3, fsdp, config)
    assert message in str(refusal.value)
    check_context_parallel(1, fsdp, config)
