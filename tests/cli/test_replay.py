"""From where a step is repeated, and when it cannot be."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.training import settings_for

from slime.arguments import Args, settings_as_dict
from slime.backends.shared.checkpoint import iteration_folder
from slime.cli.replay import (
    Comparison,
    ReplayError,
    find_start,
    main,
    print_comparison,
    read_settings,
    replay_settings,
)
from slime.config.validate import check_loop


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """Settings of a run that kept the rollouts `dumps` and checkpoints after `saved`."""

    def make(*, dumps: range, saved: tuple[int, ...] = (), **overrides: Any) -> Args:
        folder = tmp_path / "details"
        args = settings_for("model", dump_details=str(folder), save=str(tmp_path / "save"), **overrides)
        for number in dumps:
            path = folder / "rollout_data" / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for number in saved:
            iteration_folder(str(tmp_path / "save"), number).mkdir(parents=True)
            (iteration_folder(str(tmp_path / "save"), number) / "meta.json").touch()
        return args

    return make


def test_a_step_is_repeated_from_the_nearest_checkpoint_before_it(make_run: Any, tmp_path: Path) -> None:
    args = make_run(dumps=range(10), saved=(1, 3, 5))
    assert find_start(args, 5) == (str(tmp_path / "save"), 3, 4, None)
    assert find_start(args, 4) == (str(tmp_path / "save"), 3, 4, None)
    assert find_start(args, 1) == (None, None, 0, None)


def test_checkpoints_without_the_optimizer_or_without_the_critic_are_not_used(make_run: Any, tmp_path: Path) -> None:
    assert find_start(make_run(dumps=range(6), saved=(3,), no_save_optim=True), 5) == (None, None, 0, None)
    args = make_run(dumps=range(6), saved=(2, 4), advantage_estimator="ppo")
    assert find_start(args, 5) == (None, None, 0, None)
    critic = iteration_folder(str(tmp_path / "save" / "critic"), 2)
    critic.mkdir(parents=True)
    (critic / "meta.json").touch()
    assert find_start(args, 5) == (str(tmp_path / "save"), 2, 3, str(critic))
    again = replay_settings(args, 5, tmp_path / "again")
    assert (again.load, again.ckpt_step, again.critic_load) == (str(tmp_path / "save"), 2, str(critic))


def test_a_gap_in_the_dumps_is_named(make_run: Any) -> None:
    args = make_run(dumps=range(3, 6), saved=(2,))
    assert find_start(args, 5).first == 3
    with pytest.raises(ReplayError, match=r"rollout 6 cannot be repeated: there is no .*/6\.json"):
        find_start(args, 6)


def test_a_replay_keeps_the_schedule_and_writes_to_its_own_folder(make_run: Any, tmp_path: Path) -> None:
    args = make_run(dumps=range(10), lr_decay_style="linear", colocate=True, rollout_num_gpus=None)
    again = replay_settings(args, 4, tmp_path / "again")
    assert (again.num_rollout, again.lr_decay_iters) == (5, 10)
    assert again.debug_train_only and again.save is None and again.run_dir == str(tmp_path / "again")
    assert again.rollout_function_path == "slime.rollout.debug_data.generate_rollout"
    assert (again.global_batch_size, again.num_trainers) == (args.global_batch_size, args.num_trainers)


def test_a_run_that_sampled_ahead_and_evaluated_is_repeated_by_the_plain_loop(make_run: Any, tmp_path: Path) -> None:
    sets = tmp_path / "sets.yaml"
    sets.write_text("eval: {datasets: [{name: held, path: held.jsonl}]}")
    ahead = {"update_weights_interval": 2, "max_weight_staleness": 2}
    args = make_run(dumps=range(3), eval_interval=1, eval_config=str(sets), **ahead)
    check_loop(replay_settings(args, 2, tmp_path / "again"), is_async=False)


def test_a_run_that_saved_beside_training_is_repeated_without_saving(make_run: Any, tmp_path: Path) -> None:
    again = replay_settings(make_run(dumps=range(3), async_save=True), 2, tmp_path / "again")
    assert (again.save, again.async_save) == (None, False)


def test_a_run_that_kept_nothing_cannot_be_repeated(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="the run kept no rollouts: start it with --dump-details"):
        replay_settings(settings_for("model"), 0, tmp_path)


def test_settings_are_those_that_the_run_wrote_down(make_run: Any, tmp_path: Path) -> None:
    args = make_run(dumps=range(1))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings_as_dict(args)))
    assert dataclasses.asdict(read_settings(tmp_path)) == dataclasses.asdict(args)


def test_a_folder_that_is_no_run_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--rollout-id", "0"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not the directory of a run")


def test_numbers_are_compared_bit_for_bit() -> None:
    assert Comparison("train/loss", 0.1, 0.1).is_same
    assert Comparison("train/loss", math.nan, math.nan).is_same
    assert not Comparison("train/loss", 0.1, math.nextafter(0.1, 1)).is_same


def test_a_number_that_differs_is_shown_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison([Comparison("train/loss", 0.1, 0.2), Comparison("train/grad_norm", 1.0, 1.0)], 3)
    out = capsys.readouterr().out
    assert "DIFFERENT" in out and "1 of 2 numbers differ" in out
    print_comparison([Comparison("train/loss", 0.1, 0.1)], 3)
    assert "the same, bit for bit" in capsys.readouterr().out
