"""How the model is updated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from slime.config.base import Group, arg, check, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Group):
    """Optimizer: batch arithmetic, AdamW, learning-rate schedule, clipping."""

    global_batch_size: int | None = arg(None, "Samples of one optimizer step (default: those of a rollout).")
    num_steps_per_rollout: int | None = arg(None, "Optimizer steps on one rollout; sets --global-batch-size.")
    micro_batch_size: int = arg(1, "Samples of one forward on one rank, without --use-dynamic-batch-size.")
    use_dynamic_batch_size: bool = arg(False, "Pack samples into micro-batches of at most --max-tokens-per-gpu.")
    max_tokens_per_gpu: int | None = arg(None, "Tokens of one packed micro-batch on one rank.")
    log_probs_max_tokens_per_gpu: int | None = arg(None, "The same where no gradient is taken (default: the same).")
    balance_data: bool = arg(True, "Share samples among ranks by cost, the quadratic part of attention included.")
    log_probs_chunk_size: int = arg(
        512, "Tokens whose logits are held at once; memory is this x vocabulary x 10 bytes."
    )
    optimizer: Literal["adam", "sgd"] = arg("adam", "AdamW; with Megatron also SGD with --sgd-momentum.")
    sgd_momentum: float = arg(0.9, "Momentum of SGD.")
    only_train_params_name_list: list[str] | None = arg(
        None,
        "Regular expressions: of the actor's parameters train those in whose name one is found; names are those of "
        "Hugging Face's tensors, with Megatron also its own, layers and experts counted over the whole model.",
    )
    freeze_params_name_list: list[str] | None = arg(None, "Likewise: train all but those.")
    reset_optimizer_states: bool = arg(False, "Moments and step counts of AdamW start anew with each rollout.")
    lr: float = arg(1e-6, "Learning rate.")
    min_lr: float = arg(0.0, "The schedule's lowest learning rate.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = arg(
        "constant", "Shape of the learning-rate schedule."
    )
    lr_decay_iters: int | None = arg(None, "Optimizer steps over which it decays (default: all of the run).")
    lr_warmup_iters: int = arg(0, "Optimizer steps of linear warm-up.")
    lr_warmup_fraction: float | None = arg(None, "Warm-up as a share of --lr-decay-iters.")
    lr_warmup_init: float = arg(0.0, "Learning rate at the start of the warm-up.")
    lr_wsd_decay_iters: int | None = arg(None, "Steps of the final decay of WSD.")
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = arg(
        "exponential", "Shape of that decay."
    )
    use_checkpoint_lr_scheduler: bool = arg(
        False, "A run that continues keeps the learning-rate schedule of its checkpoint, whatever the settings say."
    )
    override_lr_scheduler: bool = arg(
        False,
        "A run that continues follows the settings' schedule, as it does anyway; without a warning where that is new.",
        alias="--override-opt-param-scheduler",
    )
    weight_decay: float = arg(0.0, "Decoupled weight decay, on matrices only.")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = arg(
        "constant", "How weight decay goes over the run: it is --weight-decay, or from --start- to --end-weight-decay."
    )
    start_weight_decay: float | None = arg(None, "Weight decay of the first optimizer step.")
    end_weight_decay: float | None = arg(None, "Weight decay at the end of the run.")
    adam_beta1: float = arg(0.9, "Decay of the first moment.")
    adam_beta2: float = arg(0.95, "Decay of the second moment.")
    adam_eps: float = arg(1e-8, "Added to the root of the second moment.")
    clip_grad: float = arg(1.0, "Largest gradient norm; 0: no clipping.")
    max_skipped_steps: int = arg(3, "Optimizer steps skipped for NaN or inf before the run stops.")
    seed: int = arg(1234, "Seed of the trainer.")

    def __post_init__(self) -> None:
        check_positive(self, "global_batch_size", "num_steps_per_rollout", "micro_batch_size", "max_tokens_per_gpu")
        check_positive(self, "log_probs_max_tokens_per_gpu", "log_probs_chunk_size", "lr_decay_iters")
        check_positive(self, "lr_wsd_decay_iters", "adam_eps")
        check_not_negative(self, "lr", "min_lr", "lr_warmup_iters", "lr_warmup_init", "weight_decay", "clip_grad")
        check_not_negative(self, "max_skipped_steps", "start_weight_decay", "end_weight_decay")
        style = self.weight_decay_incr_style
        for name in ("start_weight_decay", "end_weight_decay"):
            has_one = getattr(self, name) is not None
            requirement = f"{'left out' if has_one else 'given'} with --weight-decay-incr-style {style}"
            check(has_one == (style != "constant"), name, requirement, getattr(self, name))
        fraction = self.lr_warmup_fraction
        check(fraction is None or 0 <= fraction <= 1, "lr_warmup_fraction", "between 0 and 1", fraction)
        check(
            fraction is None or self.lr_warmup_iters == 0,
            "lr_warmup_fraction",
            f"left out where --lr-warmup-iters {self.lr_warmup_iters} is given",
            fraction,
        )
        check(self.min_lr <= self.lr, "min_lr", f"at most --lr {self.lr}", self.min_lr)
        for name in ("only_train_params_name_list", "freeze_params_name_list"):
            for pattern in getattr(self, name) or []:
                check(_is_pattern(pattern), name, "regular expressions", pattern)
        check(
            self.only_train_params_name_list is None or self.freeze_params_name_list is None,
            "freeze_params_name_list",
            "left out where --only-train-params-name-list is given",
            self.freeze_params_name_list,
        )
        check(
            not (self.use_checkpoint_lr_scheduler and self.override_lr_scheduler),
            "override_lr_scheduler",
            "left out with --use-checkpoint-lr-scheduler",
            self.override_lr_scheduler,
        )
        for name in ("adam_beta1", "adam_beta2", "sgd_momentum"):
            check(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))
        super().__post_init__()


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
