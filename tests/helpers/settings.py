"""Settings of small runs, as the command line gives them."""

from __future__ import annotations

from pathlib import Path

from slime.arguments import Args, parse_args

BASE = {
    "--train-backend": "fsdp",
    "--rm-type": "random",
    "--rollout-batch-size": "2",
    "--n-samples-per-prompt": "2",
    "--num-rollout": "1",
    "--actor-num-gpus-per-node": "1",
}


def run_args(model: Path, prompts: Path, base: dict[str, str], *flags: str) -> Args:
    """Settings of one rollout of 2 prompts, 2 samples each; `base` adds to them or takes their places."""
    settings = BASE | {"--hf-checkpoint": str(model), "--prompt-data": str(prompts)} | base
    return parse_args([*(part for item in settings.items() for part in item), *flags])
