"""What is loaded and saved."""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.base import Group, arg, check, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Group):
    """Checkpoint: where a run starts from and what it leaves."""

    load: str | None = arg(
        None, "Checkpoint folder of the actor; empty or absent: start from --ref-load, else --hf-checkpoint."
    )
    ckpt_step: int | None = arg(None, "Step to load (default: that of latest_checkpointed_iteration.txt).")
    resume: bool = arg(False, "Continue from the last complete checkpoint in --save, if there is one.")
    ref_load: str | None = arg(None, "Reference model (default: --hf-checkpoint).")
    ref_ckpt_step: int | None = arg(None, "Step of the reference model's checkpoint.")
    save: str | None = arg(None, "Checkpoint folder to write to.")
    save_interval: int | None = arg(None, "Rollouts between two checkpoints; the last rollout is saved too.")
    save_hf: str | None = arg(None, "At each save also write a Hugging Face directory here; {rollout_id} is filled in.")
    async_save: bool = arg(
        False, "Train on while a checkpoint is written, from a copy in host memory; the last is waited for at the end."
    )
    no_save_optim: bool = arg(False, "Leave the optimizer out of checkpoints.")
    no_load_optim: bool = arg(False, "Do not load the optimizer.")
    no_load_rng: bool = arg(False, "Do not load the state of random numbers.")
    finetune: bool = arg(False, "Take the weights only: optimizer, data and rollout id start anew.")

    def __post_init__(self) -> None:
        check_positive(self, "save_interval")
        check_not_negative(self, "ckpt_step", "ref_ckpt_step")
        if self.save_hf is not None:
            check(_is_template(self.save_hf), "save_hf", "a path in which only {rollout_id} is filled in", self.save_hf)
        if self.resume:
            check(self.save is not None, "save", "given with --resume", self.save)
        super().__post_init__()


def _is_template(path: str) -> bool:
    try:
        path.format(rollout_id=0)
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
    return True
