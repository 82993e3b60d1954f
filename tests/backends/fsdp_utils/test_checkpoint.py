"""Continuation bit for bit, and at another number of ranks, is tested in test_backend.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, make_recipe, random_batch, settings_for
from torch.distributed.checkpoint import FileSystemWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.fsdp_utils.checkpoint import find_checkpoint
from slime.backends.shared import checkpoint as shared_checkpoint
from slime.backends.shared.checkpoint import CheckpointError, iteration_folder


def trained(model: Path, dump_dir: Path, *, num_rollouts: int = 1, **settings: Any) -> FSDPBackend:
    """A backend after some rollouts."""
    args = settings_for(model, **settings)
    backend = make_backend(args)
    backend.load()
    recipe = make_recipe(backend, args, dump_dir)
    for rollout_id in range(num_rollouts):
        recipe.train(rollout_id, random_batch(seed=rollout_id))
    return backend


def optimizer_state(backend: FSDPBackend) -> dict[str, dict[str, torch.Tensor]]:
    names = {parameter: name for name, parameter in backend.models["actor"].named_parameters()}
    return {
        names[parameter]: {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in entry.items()
        }
        for parameter, entry in backend.optimizer.state.items()
    }


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_weights_and_optimizer_come_back_bit_for_bit(model: Path, tmp_path: Path) -> None:
    saved = trained(model, tmp_path, num_rollouts=3, save=str(tmp_path), num_steps_per_rollout=2)
    saved.save(2)
    loaded = make_backend(settings_for(model, load=str(tmp_path)))
    assert loaded.load() == 3
    assert loaded.num_steps == saved.num_steps == 6
    assert same(full_weights(loaded), full_weights(saved))
    ours, theirs = optimizer_state(loaded), optimizer_state(saved)
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_from_before_the_first_step_changes_nothing(model: Path, tmp_path: Path) -> None:
    plain = trained(model, tmp_path, weight_decay=0.1)
    saved = make_backend(settings_for(model, weight_decay=0.1, save=str(tmp_path)))
    saved.load()
    saved.save(0)
    loaded = make_backend(settings_for(model, weight_decay=0.1, load=str(tmp_path)))
    assert loaded.load() == 1
    for backend in (saved, loaded):
        make_recipe(backend, settings_for(model, weight_decay=0.1), tmp_path).train(0, random_batch(seed=0))
        assert same(full_weights(backend), full_weights(plain))


def test_each_parameter_has_a_step_count_of_its_own_after_loading(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, save=str(tmp_path)).save(0)
    loaded = make_backend(settings_for(model, load=str(tmp_path)))
    loaded.load()
    counts = [entry["step"] for entry in loaded.optimizer.state.values()]
    assert len({count.data_ptr() for count in counts}) == len(counts)
    assert {float(count) for count in counts} == {1.0}


def test_random_numbers_go_on_where_they_were(model: Path, tmp_path: Path) -> None:
    backend = trained(model, tmp_path, save=str(tmp_path))
    torch.manual_seed(77)
    backend.save(0)
    expected = torch.rand(3)
    make_backend(settings_for(model, load=str(tmp_path))).load()
    assert torch.equal(torch.rand(3), expected)
    make_backend(settings_for(model, load=str(tmp_path), no_load_rng=True)).load()
    assert not torch.equal(torch.rand(3), expected)


def test_settings_win_over_the_optimizers_of_the_checkpoint(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, save=str(tmp_path), weight_decay=0.3, adam_beta2=0.9).save(0)
    loaded = make_backend(settings_for(model, load=str(tmp_path), weight_decay=0.1, adam_beta2=0.99))
    loaded.load()
    assert [group["weight_decay"] for group in loaded.optimizer.param_groups] == [0.1, 0.0]
    assert {group["betas"] for group in loaded.optimizer.param_groups} == {(0.9, 0.99)}


def test_the_schedule_of_the_checkpoint_goes_on_where_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, save=str(tmp_path), lr=0.5, lr_decay_style="linear").save(0)
    flags = {"load": str(tmp_path), "lr": 1e-3}
    for settings, lr in (({}, 1e-3), ({"use_checkpoint_lr_scheduler": True}, 0.5 * (1 - 1 / 10))):
        backend = make_backend(settings_for(model, **flags | settings))
        backend.load()
        metrics = make_recipe(backend, backend.run, tmp_path).train(1, random_batch(seed=1))  # type: ignore[arg-type]
        assert metrics["train/lr-pg_0"] == pytest.approx(lr)


def test_finetune_takes_the_weights_only(model: Path, tmp_path: Path) -> None:
    saved = trained(model, tmp_path, save=str(tmp_path))
    saved.save(5)
    loaded = make_backend(settings_for(model, load=str(tmp_path), finetune=True))
    assert loaded.load() == 0
    assert loaded.num_steps == 0
    assert not loaded.optimizer.state
    assert same(full_weights(loaded), full_weights(saved))


def test_a_step_that_is_asked_for_is_loaded(model: Path, tmp_path: Path) -> None:
    backend = trained(model, tmp_path, save=str(tmp_path))
    backend.save(0)
    first = full_weights(backend)
    make_recipe(backend, backend.run, tmp_path).train(1, random_batch(seed=9))  # type: ignore[arg-type]
    backend.save(1)
    loaded = make_backend(settings_for(model, load=str(tmp_path), ckpt_step=0))
    assert loaded.load() == 1
    assert same(full_weights(loaded), first)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .*iter_0000007; present: iter_0000000, "):
        make_backend(settings_for(model, load=str(tmp_path), ckpt_step=7)).load()


def test_without_its_optimizer_a_checkpoint_says_which_flag_helps(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, save=str(tmp_path), no_save_optim=True).save(0)
    with pytest.raises(CheckpointError, match="saved without its optimizer: pass --no-load-optim"):
        make_backend(settings_for(model, load=str(tmp_path))).load()
    assert make_backend(settings_for(model, load=str(tmp_path), no_load_optim=True)).load() == 1


def test_a_checkpoint_written_before_any_step_can_be_loaded(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, num_rollouts=0, save=str(tmp_path)).save(0)
    assert make_backend(settings_for(model, load=str(tmp_path))).load() == 1


def test_a_checkpoint_of_a_run_that_skipped_all_its_steps_can_be_loaded(model: Path, tmp_path: Path) -> None:
    args = settings_for(model, save=str(tmp_path), rewards_normalization=False)
    backend = make_backend(args)
    backend.load()
    batch = random_batch()
    batch.rewards[:] = float("nan")
    assert make_recipe(backend, args, tmp_path).train(0, batch)["train/skipped_steps"] == 1
    backend.save(0)
    assert make_backend(settings_for(model, load=str(tmp_path))).load() == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"intermediate_size": 96},
            r"tensor lm\..*mlp.* has shape \((128, 64|64, 128)\), the model wants \((96, 64|64, 96)\)",
        ),
        ({"num_hidden_layers": 3}, r"has no tensor lm\.model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"the model has no tensor lm\.model\.layers\.1\."),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_tensor(
    model: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    trained(model, tmp_path, num_rollouts=0, save=str(tmp_path)).save(0)
    other = make_tiny_model(tmp_path / "other", **overrides)
    with pytest.raises(CheckpointError, match=message):
        make_backend(settings_for(other, load=str(tmp_path))).load()


# --- complete or absent


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def rename_but_not_checkpoints(path: Path, target: Path, rename: Any = Path.rename) -> None:
    if path.name.startswith(".iter_"):
        no_space()
    rename(path, target)


CRASHES: dict[str, tuple[Any, str, Any]] = {
    "write": (FileSystemWriter, "write_data", no_space),
    "fsync": (shared_checkpoint, "fsync_tree", no_space),  # all is written, but not durable
    "rename": (Path, "rename", rename_but_not_checkpoints),  # durable, not in place
    "tracker": (shared_checkpoint, "write_text_atomically", no_space),  # in place, not announced
}


@pytest.mark.parametrize("moment", CRASHES)
def test_a_save_that_is_cut_short_leaves_the_last_checkpoint_valid(
    moment: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = trained(model, tmp_path, save=str(tmp_path))
    backend.save(0)
    before = full_weights(backend)
    make_recipe(backend, backend.run, tmp_path).train(1, random_batch(seed=1))  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(*CRASHES[moment])
        with pytest.raises((OSError, CheckpointError), match="No space left on device") as failure:
            backend.save(1)
    assert len(str(failure.value).splitlines()) == 1
    found = find_checkpoint(str(tmp_path), None)
    assert found == find_checkpoint(str(found), None)
    assert found == iteration_folder(str(tmp_path), 0)
    loaded = make_backend(settings_for(model, load=str(tmp_path)))
    assert loaded.load() == 1
    assert same(full_weights(loaded), before)
    backend.save(1)  # what the crash left behind is no obstacle
    assert find_checkpoint(str(tmp_path), None) == iteration_folder(str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_without_a_tracker_holds_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(None, None) is None
    assert find_checkpoint(str(tmp_path), None) is None
    assert find_checkpoint(str(tmp_path / "absent"), None) is None


def test_a_tracker_that_names_nothing_readable_is_an_error(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("release\n")
    with pytest.raises(CheckpointError, match=r"iteration.txt must hold a step number, got 'release'"):
        find_checkpoint(str(tmp_path), None)
    tracker.write_text("12\n")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .*iter_0000012; present: none"):
        find_checkpoint(str(tmp_path), None)


# --- Hugging Face export


def test_save_hf_writes_a_model_that_transformers_loads(model: Path, tmp_path: Path) -> None:
    backend = trained(model, tmp_path, save=str(tmp_path / "save"), save_hf=str(tmp_path / "hf_{rollout_id}"))
    backend.save(3)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_3")
    weights = full_weights(backend)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in lm.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "hf_3").decode([80]) != ""


def test_saving_again_replaces_the_export(model: Path, tmp_path: Path) -> None:
    backend = trained(model, tmp_path, num_rollouts=0, save=str(tmp_path / "save"), save_hf=str(tmp_path / "hf"))
    backend.save(0)
    (tmp_path / "hf" / "stale").write_text("")
    backend.save(1)
    assert not (tmp_path / "hf" / "stale").exists()
    assert (tmp_path / "hf" / "config.json").is_file()


def test_a_damaged_checkpoint_is_refused_in_one_sentence(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, num_rollouts=0, save=str(tmp_path)).save(0)
    for shard in (tmp_path / "iter_0000000" / "model").glob("*.distcp"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000000 cannot be read: rank 0: .*No such file"):
        make_backend(settings_for(model, load=str(tmp_path))).load()


def test_a_moved_checkpoint_loads(model: Path, tmp_path: Path) -> None:
    trained(model, tmp_path, num_rollouts=0, save=str(tmp_path / "a")).save(0)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert make_backend(settings_for(model, load=str(tmp_path / "b"))).load() == 1
    assert os.listdir(tmp_path / "b") != []
