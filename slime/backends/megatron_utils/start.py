"""Opening the backend of a rank; what may be done before Megatron is imported is done here."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Literal

import torch

from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.find import Megatron, find_megatron
from slime.backends.megatron_utils.sources import critic_run
from slime.backends.shared.precision import compute_dtype
from slime.config.base import ConfigError
from slime.config.run import RunConfig
from slime.utils.misc import load_function

if TYPE_CHECKING:
    from slime.backends.megatron_utils.backend import MegatronBackend

logger = logging.getLogger(__name__)


def open_backend(
    run: RunConfig,
    cfg: MegatronConfig,
    device: torch.device,
    *,
    torch_compile: bool | None = None,
    role: Literal["actor", "critic"] = "actor",
) -> MegatronBackend:
    """This rank's backend, not yet loaded. run: the actor's. torch_compile: as --torch-compile; by default not."""
    megatron = find_megatron()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # kernels of tensor-parallel ranks start in order
    has_engine = uses_transformer_engine(cfg, megatron)
    own_run = critic_run(run) if role == "critic" else run
    if megatron.has_training:
        from slime.backends.megatron_utils.global_args import set_global_args

        set_global_args(own_run, cfg, device, transformer_engine=has_engine, is_critic=role == "critic")
    if cfg.custom_megatron_init_path is not None:
        load_function(cfg.custom_megatron_init_path)(run)
    elif device.type != "cuda":
        raise ConfigError("--train-backend megatron trains on GPUs, and there is none: use --train-backend fsdp.")
    logger.info("%s", megatron)
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter
    from slime.backends.megatron_utils.backend import MegatronBackend
    from slime.backends.megatron_utils.transformer import warn_of_settings_without_effect

    warn_of_settings_without_effect(cfg)
    return MegatronBackend(
        own_run,
        cfg,
        device,
        dtype=compute_dtype(run, device),
        transformer_engine=has_engine,
        torch_compile=bool(torch_compile),
        role=role,
    )


def uses_transformer_engine(cfg: MegatronConfig, megatron: Megatron) -> bool:
    """Whether layers are Transformer Engine's. Raises ConfigError where they are asked for and there is none."""
    if cfg.transformer_impl == "transformer_engine" and not megatron.has_transformer_engine:
        raise ConfigError("--transformer-impl transformer_engine: Transformer Engine is not installed; use auto.")
    return cfg.transformer_impl != "local" and megatron.has_transformer_engine
