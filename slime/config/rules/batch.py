"""Rules of batch sizes and of checkpoints."""

from __future__ import annotations

import logging
from typing import Any

from slime.config.rules.base import require
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)


def checkpoint_rules(config: RunConfig) -> dict[str, Any]:
    """Where a run loads from and what it saves."""
    require(config.save_hf is None or config.save is not None, "--save-hf needs --save: both are written together.")
    require(not config.async_save or config.save is not None, "--async-save needs --save: a folder to write to.")
    require(
        config.save_interval is None or config.save is not None, "--save-interval needs --save: a folder to write to."
    )
    require(
        config.ref_ckpt_step is None or config.ref_load is not None,
        "--ref-ckpt-step needs --ref-load: the checkpoint folder that has this step.",
    )
    if not config.resume:
        require(
            config.ckpt_step is None or config.load is not None,
            "--ckpt-step needs --load (or --resume): the checkpoint folder that has this step.",
        )
        if config.no_load_optim and config.load is None:
            logger.warning("--no-load-optim is ignored without --load or --resume")
        return {}
    require(
        config.load in (None, config.save), f"--resume continues from --save {config.save}; drop --load {config.load}."
    )
    return {"load": config.save}


def batch_rules(config: RunConfig) -> dict[str, Any]:
    """Samples of a rollout, of an optimizer step and of a micro-batch."""
    require(config.rollout_batch_size is not None, "--rollout-batch-size must be given: the prompts of one rollout.")
    require(
        config.num_rollout is not None or config.num_epoch is not None, "--num-rollout or --num-epoch must be given."
    )
    require(
        config.num_rollout is not None or config.rollout_global_dataset,
        "--num-epoch counts passes over --prompt-data; with --disable-rollout-global-dataset give --num-rollout.",
    )
    require(
        not config.use_dynamic_batch_size or config.max_tokens_per_gpu is not None,
        "--use-dynamic-batch-size needs --max-tokens-per-gpu.",
    )
    if config.max_tokens_per_gpu is not None and not config.use_dynamic_batch_size:
        logger.warning("--max-tokens-per-gpu is ignored without --use-dynamic-batch-size")
    if config.log_probs_max_tokens_per_gpu not in (None, config.max_tokens_per_gpu):
        logger.warning("--log-probs-max-tokens-per-gpu is ignored: log-probs take the micro-batches of training")
    num_samples = (config.rollout_batch_size or 0) * config.n_samples_per_prompt
    global_batch_size = config.global_batch_size or num_samples // (config.num_steps_per_rollout or 1)
    if config.num_steps_per_rollout is not None:
        require(
            global_batch_size * config.num_steps_per_rollout == num_samples,
            f"--num-steps-per-rollout {config.num_steps_per_rollout} x --global-batch-size {global_batch_size} is not "
            f"--rollout-batch-size x --n-samples-per-prompt = {num_samples}.",
        )
    require(
        global_batch_size <= num_samples and num_samples % global_batch_size == 0,
        f"--global-batch-size {global_batch_size} must divide --rollout-batch-size {config.rollout_batch_size} x "
        f"--n-samples-per-prompt {config.n_samples_per_prompt} = {num_samples}.",
    )
    require(
        global_batch_size >= config.num_data_ranks or config.debug_rollout_only,
        f"--global-batch-size {global_batch_size} is smaller than the {config.num_data_ranks} trainer ranks that share "
        "it.",
    )
    return {
        "global_batch_size": global_batch_size,
        "num_steps_per_rollout": num_samples // global_batch_size,
        "log_probs_max_tokens_per_gpu": config.log_probs_max_tokens_per_gpu or config.max_tokens_per_gpu,
    }
