"""`slime replay RUN_DIR --rollout-id N`: one training step of a run again, from its dumps, compared with what it was.

Starts from the last checkpoint before N that holds the optimizer, or else from where the run started, and trains on the
dumped rollouts up to N, with the run's own settings and as many ranks. On a CPU every number must come out the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from slime.cli.errors import reported_errors

if TYPE_CHECKING:
    from slime.arguments import Args


class ReplayError(ValueError):
    """This step of this run cannot be repeated; the message says what is missing."""


class Start(NamedTuple):
    """load: checkpoint folder, None for the Hugging Face directory; step: which of it. first: rollout to train on.

    critic_load: as the flag of that name, with a critic.
    """

    load: str | None
    step: int | None
    first: int
    critic_load: str | None = None


class Comparison(NamedTuple):
    """One metric of the step: what the run recorded, what the replay found."""

    name: str
    recorded: float
    replayed: float

    @property
    def is_same(self) -> bool:
        """Bit for bit; two NaN are the same."""
        return self.recorded == self.replayed or (self.recorded != self.recorded and self.replayed != self.replayed)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 where every number is the same, 1 where one differs or the step cannot be repeated."""
    parser = argparse.ArgumentParser(prog="slime replay", description="Repeat one training step of a run.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run with --dump-details")
    parser.add_argument("--rollout-id", type=int, required=True, metavar="N", help="the step to repeat")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the replay writes [RUN_DIR/replay_N]")
    options = parser.parse_args(argv)
    with reported_errors() as outcome:
        rows = replay(options.run_dir, options.rollout_id, options.output)
        print_comparison(rows, options.rollout_id)
        if not all(row.is_same for row in rows):
            outcome.code = 1
    return outcome.code


def replay(run_dir: Path, rollout_id: int, output: Path | None = None) -> list[Comparison]:
    """Repeat the step; `train/*` metrics beside those that the run recorded. Raises ReplayError, ConfigError."""
    from slime.driver import train
    from slime.observability.tracking import read_metrics

    args = read_settings(run_dir)
    recorded = _values_at(read_metrics(run_dir), rollout_id)
    if not recorded:
        raise ReplayError(f"{run_dir} has no metrics of a training step {rollout_id}")
    folder = output or run_dir / f"replay_{rollout_id}"
    train(replay_settings(args, rollout_id, folder))
    replayed = _values_at(read_metrics(folder), rollout_id)
    return [Comparison(name, recorded[name], replayed[name]) for name in recorded if name in replayed]


def read_settings(run_dir: Path) -> Args:
    """The settings of a run, from its args.yaml."""
    from slime.arguments import Args

    path = run_dir / "args.yaml"
    if not path.is_file():
        raise ReplayError(f"{run_dir} is not the directory of a run: it has no args.yaml")
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return Args(**values)


def replay_settings(args: Args, rollout_id: int, folder: Path) -> Args:
    """Settings that train from the start nearest to `rollout_id` up to it, on the run's dumps, and save nothing."""
    from slime.config.validate import resolve

    if args.save_debug_rollout_data is None:
        raise ReplayError("the run kept no rollouts: start it with --dump-details, or --save-debug-rollout-data")
    if args.keep_old_actor:
        raise ReplayError("--keep-old-actor: the old policy is what engines were sent, which a replay has none of")
    start = find_start(args, rollout_id)
    num_steps = (args.num_rollout or 1) * (args.num_steps_per_rollout or 1)
    return resolve(
        replace(
            args,
            load=start.load,
            ckpt_step=start.step,
            critic_load=start.critic_load,
            start_rollout_id=start.first,
            num_rollout=rollout_id + 1,
            lr_decay_iters=args.lr_decay_iters or num_steps,
            load_debug_rollout_data=args.save_debug_rollout_data,
            load_debug_rollout_data_subsample=None,
            save_debug_rollout_data=None,
            save_debug_train_data=f"{folder}/train_data/{{rollout_id}}_{{rank}}.npz",
            dump_details=None,
            true_on_policy_mode=False,
            ci_test=False,
            ci_disable_kl_checker=False,
            ci_save_grad_norm=None,
            ci_load_grad_norm=None,
            ci_metric_checker_key=None,
            ci_metric_checker_threshold=None,
            run_dir=str(folder),
            resume=False,
            save=None,
            save_interval=None,
            save_hf=None,
            async_save=False,
            critic_save=None,
            eval_interval=None,
            eval_prompt_data=None,
            eval_config=None,
            update_weights_interval=1,
            max_weight_staleness=None,
            colocate=False,
            offload=False,
            offload_train=None,
            offload_rollout=None,
            use_wandb=False,
            use_tensorboard=False,
        )
    )


def find_start(args: Args, rollout_id: int) -> Start:
    """The nearest state before `rollout_id` from which all rollouts are there. Raises ReplayError if there is none."""
    from slime.rollout.debug_data import dump_path

    assert args.save_debug_rollout_data is not None
    candidates = _checkpoints(args, rollout_id) if not args.no_save_optim else []
    load = None if args.resume else args.load
    candidates.append(Start(load, args.ckpt_step if load else None, args.start_rollout_id or 0, args.critic_load))
    missing = []
    for start in candidates:
        paths = [dump_path(args.save_debug_rollout_data, number) for number in range(start.first, rollout_id + 1)]
        gaps = [path for path in paths if not path.is_file()]
        if paths and not gaps:
            return start
        missing += gaps[:1]
    raise ReplayError(f"rollout {rollout_id} cannot be repeated: there is no {missing[0] if missing else 'dump of it'}")


def _checkpoints(args: Args, rollout_id: int) -> list[Start]:
    """Complete checkpoints before `rollout_id`, with the critic where there is one, the nearest first."""
    from slime.backends.fsdp_utils.checkpoint import is_complete
    from slime.backends.shared.checkpoint import iteration_folder
    from slime.config.run import critic_settings

    if args.save is None:
        return []
    save, critic_save = args.save, critic_settings(args).save if args.needs_critic else None
    starts = []
    for step in range(rollout_id - 1, -1, -1):
        critic = iteration_folder(critic_save, step) if critic_save is not None else None
        if is_complete(iteration_folder(save, step)) and (critic is None or is_complete(critic)):
            starts.append(Start(save, step, step + 1, str(critic) if critic is not None else None))
    return starts


def _values_at(metrics: Any, rollout_id: int) -> dict[str, float]:
    """`train/*` of one step by name."""
    found = {}
    for name, series in metrics.get("train/step", {}).items():
        values = dict(zip(series.steps, series.values, strict=True))
        if rollout_id in values and name.startswith("train/"):
            found[name] = values[rollout_id]
    return found


def print_comparison(rows: list[Comparison], rollout_id: int) -> None:
    """A table, and in a sentence whether anything differs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"training step {rollout_id}")
    for title in ("metric", "run", "replay", ""):
        table.add_column(title)
    for row in rows:
        table.add_row(row.name, repr(row.recorded), repr(row.replayed), "same" if row.is_same else "DIFFERENT")
    console = Console()
    console.width = max(console.width, 100)  # else numbers are cut off
    console.print(table)
    num_different = sum(not row.is_same for row in rows)
    print(f"{num_different} of {len(rows)} numbers differ" if num_different else "the same, bit for bit")
