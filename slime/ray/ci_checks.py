"""The checks of --ci-test: numbers that the metrics of a run must have."""

from __future__ import annotations

import json
import math
from pathlib import Path

from slime.arguments import Args

KL_TOLERANCE = 1e-3  # what half precision leaves of 0 in a few tokens; other weights are far beyond
GRAD_NORM_TOLERANCE = 0.01  # relative


class CheckFailed(RuntimeError):
    """A metric is not what --ci-test asks for."""


class Checks:
    """Looks at every step of a run. Owns the best value of --ci-metric-checker-key."""

    def __init__(self, args: Args) -> None:
        self.args = args
        self.best = -math.inf

    def step(self, rollout_id: int, metrics: dict[str, float]) -> None:
        """Raise CheckFailed, with the metric's name and value, where one of this rollout is wrong."""
        self.note(metrics)
        if "train/grad_norm" not in metrics:
            return
        args = self.args
        name = "train/train_rollout_logprob_abs_diff"
        self._bound(rollout_id, metrics, name, args.ci_train_rollout_logprob_abs_diff_threshold)
        if rollout_id == 0 and args.load is None and not args.ci_disable_kl_checker:
            self._first_kl(metrics)
        if args.ci_save_grad_norm is not None:
            _write(Path(args.ci_save_grad_norm.format(rollout_id=rollout_id)), metrics["train/grad_norm"])
        if args.ci_load_grad_norm is not None:
            path = Path(args.ci_load_grad_norm.format(rollout_id=rollout_id))
            _compare(rollout_id, path, metrics["train/grad_norm"])

    def note(self, metrics: dict[str, float]) -> None:
        """Metrics among which the one to be reached may be."""
        self.best = max(self.best, metrics.get(self.args.ci_metric_checker_key or "", -math.inf))

    def end(self) -> None:
        """Raise CheckFailed where the metric to be reached was not."""
        threshold = self.args.ci_metric_checker_threshold
        if threshold is not None and not self.best >= threshold:
            best = "was never reported" if math.isinf(self.best) else f"was {self.best:g} at best"
            raise CheckFailed(
                f"--ci-test: {self.args.ci_metric_checker_key} {best}, --ci-metric-checker-threshold is {threshold:g}"
            )

    def _first_kl(self, metrics: dict[str, float]) -> None:
        """Nothing has been learned: the policy is the one before the update, and its reference where that is no other.

        With several optimizer steps the metrics are means in which later steps have moved.
        """
        if self.args.num_steps_per_rollout != 1:
            return
        self._bound(0, metrics, "train/ppo_kl", KL_TOLERANCE)
        if self.args.ref_load in (None, self.args.hf_checkpoint):
            self._bound(0, metrics, "train/kl_loss", KL_TOLERANCE)

    def _bound(self, rollout_id: int, metrics: dict[str, float], name: str, largest: float) -> None:
        value = metrics.get(name, 0.0)
        if not abs(value) <= largest:
            raise CheckFailed(f"--ci-test: {name} of rollout {rollout_id} is {value:g}, at most {largest:g} is right")


def _write(path: Path, grad_norm: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"grad_norm": grad_norm}))


def _compare(rollout_id: int, path: Path, grad_norm: float) -> None:
    if not path.is_file():
        raise CheckFailed(f"--ci-load-grad-norm: there is no file {path}")
    wanted = json.loads(path.read_text())["grad_norm"]
    if not math.isclose(grad_norm, wanted, rel_tol=GRAD_NORM_TOLERANCE):
        raise CheckFailed(
            f"--ci-test: the gradient norm of rollout {rollout_id} is {grad_norm:g}, in {path} it is {wanted:g}"
        )
