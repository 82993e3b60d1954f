"""Settings of the Megatron backend, under Megatron's own names."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from slime.backends.megatron_utils.find import find_megatron
from slime.config.base import ConfigError, Group, arg, check, check_not_negative, check_positive, flag_of
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)

# Settings of Megatron that must stay as they are.
FIXED: dict[str, tuple[object, str]] = {
    "use_megatron_fsdp": (False, "models are wrapped in Megatron's DistributedDataParallel"),
    "num_distributed_optimizer_instances": (1, "all data-parallel ranks share one optimizer"),
}


@dataclass(frozen=True, kw_only=True)
class MegatronConfig(Group):
    """Megatron: parallelism, recomputation, experts and checkpoints of the Megatron backend."""

    tensor_model_parallel_size: int = arg(1, "Ranks that share each matrix.")
    sequence_parallel: bool = arg(False, "Norms and residuals are shared among the tensor-parallel ranks too.")
    pipeline_model_parallel_size: int = arg(1, "Ranks that share the layers.")
    num_virtual_stages_per_pipeline_rank: int | None = arg(
        None, "Parts of a rank's layers; micro-batches of one are computed while others are waited for."
    )
    num_layers_per_virtual_pipeline_stage: int | None = arg(None, "The same by the number of layers of a part.")
    decoder_first_pipeline_num_layers: int | None = arg(
        None, "Layers of the first pipeline rank; the others share the rest evenly."
    )
    decoder_last_pipeline_num_layers: int | None = arg(
        None, "Layers of the last pipeline rank; the others share the rest evenly."
    )
    expert_model_parallel_size: int = arg(1, "Ranks that share the experts.")
    expert_tensor_parallel_size: int | None = arg(
        None, "Ranks that share each expert's matrices (default: --tensor-model-parallel-size)."
    )
    use_distributed_optimizer: bool = arg(False, "Optimizer state is shared among the data-parallel ranks.")
    optimizer_cpu_offload: bool = arg(
        False, "Adam's moments stay in page-locked host memory and come to the GPU, part by part, when it steps."
    )
    optimizer_offload_fraction: float = arg(1.0, "The share of them that does, with --optimizer-cpu-offload.")
    overlap_grad_reduce: bool = arg(False, "Gradients are added up among ranks while the backward still runs.")
    accumulate_allreduce_grads_in_fp32: bool = arg(True, "Gradients are added up in float32.")
    recompute_granularity: Literal["full", "selective"] | None = arg(None, "What the backward computes again.")
    recompute_method: Literal["uniform", "block"] | None = arg(None, "Which layers, with full.")
    recompute_num_layers: int | None = arg(None, "Layers of one recomputed unit (uniform), or in all (block).")
    recompute_modules: list[str] | None = arg(None, "Modules that selective computes again (default: Megatron's).")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = arg(
        "auto", "Layers: Transformer Engine's, or slime's on torch; auto takes the former where it is installed."
    )
    attention_dropout: float = arg(0.0, "Dropout of attention; the policy that samples has none.")
    hidden_dropout: float = arg(0.0, "Dropout of residuals; the policy that samples has none.")
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = arg("alltoall", "How tokens reach experts.")
    moe_grouped_gemm: bool = arg(False, "All experts of a rank in one kernel; needs Transformer Engine.")
    moe_permute_fusion: bool = arg(False, "Tokens are permuted in one kernel; needs Transformer Engine.")
    moe_router_dtype: Literal["fp32", "fp64"] | None = arg(None, "Precision of routing (default: the model's).")
    moe_aux_loss_coeff: float = arg(0.0, "Weight of the loss that balances experts.")
    ckpt_format: Literal["torch_dist", "torch"] = arg(
        "torch_dist", "What --save writes; both are read. torch goes on at the same parallelism alone."
    )
    custom_megatron_init_path: str | None = arg(None, "f(args), before a rank builds its model.")
    custom_megatron_before_log_prob_hook_path: str | None = arg(
        None, "f(args, model, store_prefix), before log-probs are computed."
    )
    custom_megatron_before_train_step_hook_path: str | None = arg(
        None, "f(args, rollout_id, step_id, model, optimizer, opt_param_scheduler), before each optimizer step."
    )
    custom_model_provider_path: str | None = arg(
        None,
        "f(pre_process, post_process, vp_stage=None) -> GPTModel: makes a rank's model; if it names them it gets "
        "config, transformer_layer_spec and GPTModel's other arguments too.",
    )
    megatron_args: dict[str, Any] = arg(
        {}, "Further settings of Megatron by name; a flag of the Megatron-LM that is found sets one."
    )

    def __post_init__(self) -> None:
        check_positive(self, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        check_positive(self, "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage")
        check_positive(self, "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        check_positive(self, "expert_model_parallel_size", "expert_tensor_parallel_size", "recompute_num_layers")
        check_not_negative(self, "moe_aux_loss_coeff")
        for name in ("attention_dropout", "hidden_dropout"):
            check(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))
        share = self.optimizer_offload_fraction
        check(0 < share <= 1, "optimizer_offload_fraction", "above 0 and at most 1", share)
        check(
            self.recompute_granularity != "full" or self.recompute_method is not None,
            "recompute_method",
            "given with --recompute-granularity full",
            self.recompute_method,
        )
        super().__post_init__()

    @property
    def host_share(self) -> float:
        """Of Adam's moments, that which stays on the host."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload else 0.0

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the weights together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


def check_megatron(cfg: MegatronConfig, run: RunConfig) -> None:
    """Raise ConfigError for a run that this backend cannot do, as far as that is known before devices are."""
    megatron = find_megatron()
    logger.info("%s", megatron)
    tensor = cfg.tensor_model_parallel_size
    is_on_cpu = run.device == "cpu" and cfg.custom_megatron_init_path is None
    for is_refused, what in (
        (is_on_cpu, "--device cpu: Megatron trains on GPUs"),
        ("mtp_num_layers" in cfg.megatron_args, "--mtp-num-layers: layers for multi-token prediction are not trained"),
        (run.optimizer == "sgd" and cfg.use_distributed_optimizer, "--optimizer sgd with --use-distributed-optimizer"),
        (
            cfg.ckpt_format == "torch" and tensor % (cfg.expert_tensor_parallel_size or tensor) != 0,
            "--ckpt-format torch: --expert-tensor-parallel-size must divide --tensor-model-parallel-size",
        ),
        *_refusals_of_offload(cfg, run),
        (cfg.moe_grouped_gemm and not megatron.has_transformer_engine, "--moe-grouped-gemm needs Transformer Engine"),
    ):
        if is_refused:
            raise ConfigError(f"{what}. Change that, or use --train-backend fsdp.")
    for name, (value, reason) in FIXED.items():
        if cfg.megatron_args.get(name, value) != value:
            raise ConfigError(f"{flag_of(name)} is not for the Megatron backend: {reason}. Leave it out.")
    check_parallelism(cfg, run.num_trainers, run.context_parallel_size)
    if run.needs_critic:
        check_parallelism(cfg, run.num_critics, run.context_parallel_size)


def _refusals_of_offload(cfg: MegatronConfig, run: RunConfig) -> list[tuple[bool, str]]:
    offloads, further = cfg.optimizer_cpu_offload, cfg.megatron_args
    kind = further.get("optimizer", run.optimizer)
    is_precision_aware = bool(further.get("use_precision_aware_optimizer"))
    return [
        (bool(further.get("optimizer_cpu_offload")), "--megatron-args: optimizer_cpu_offload is a flag of its own"),
        (cfg.optimizer_offload_fraction != 1 and not offloads, "--optimizer-offload-fraction: nothing is offloaded"),
        (offloads and kind != "adam", f"--optimizer-cpu-offload with --optimizer {kind}"),
        (offloads and is_precision_aware, "--optimizer-cpu-offload with --use-precision-aware-optimizer"),
    ]


def check_parallelism(cfg: MegatronConfig, num_ranks: int, context: int) -> None:
    """Raise ConfigError where `num_ranks` cannot be shared as the settings say."""
    size = cfg.model_parallel_size * context
    tensor, pipeline = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    if num_ranks % size:
        raise ConfigError(
            f"The {num_ranks} ranks must be a multiple of --tensor-model-parallel-size {tensor} x "
            f"--pipeline-model-parallel-size {pipeline} x --context-parallel-size {context} = {size}."
        )
    expert = cfg.expert_model_parallel_size * (cfg.expert_tensor_parallel_size or tensor) * pipeline
    if cfg.expert_model_parallel_size > 1 and num_ranks % expert:
        raise ConfigError(
            f"The {num_ranks} ranks must be a multiple of --expert-model-parallel-size "
            f"{cfg.expert_model_parallel_size} x --expert-tensor-parallel-size "
            f"{cfg.expert_tensor_parallel_size or tensor} x --pipeline-model-parallel-size {pipeline} = {expert}."
        )
    if cfg.expert_model_parallel_size == 1 and cfg.expert_tensor_parallel_size not in (None, tensor):
        # Megatron takes experts for ordinary parameters then, and does not add up the gradients of their copies.
        raise ConfigError(
            f"--expert-tensor-parallel-size {cfg.expert_tensor_parallel_size} beside --tensor-model-parallel-size "
            f"{tensor} needs --expert-model-parallel-size above 1."
        )
    if cfg.sequence_parallel and tensor == 1:
        raise ConfigError("--sequence-parallel needs --tensor-model-parallel-size above 1.")
