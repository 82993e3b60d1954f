"""The training loop, read as the algorithm."""

from __future__ import annotations

from pathlib import Path

from slime.arguments import Args
from slime.ray.job import Job


def train(args: Args, *, is_async: bool = False) -> Path:
    """Run `args.num_rollout` rollouts, each followed by training on it. Returns the run directory.

    is_async: `generate` returns a rollout that was sampled while the one before was trained on, and begins the next.
    """
    with Job(args, is_async=is_async) as job:
        rollout, actor, memory = job.rollout, job.actor, job.memory

        memory.sync_weights(job.start_rollout_id)
        if job.evaluates_at_start():
            rollout.eval(job.start_rollout_id)

        for rollout_id in job.rollout_ids():
            batch = rollout.generate(rollout_id)

            memory.to_training()
            actor.train(rollout_id, batch)
            if job.saves_after(rollout_id):
                job.save(rollout_id)

            memory.sync_weights(rollout_id + 1)
            if job.evaluates_after(rollout_id):
                rollout.eval(rollout_id + 1)
    return job.run_dir
