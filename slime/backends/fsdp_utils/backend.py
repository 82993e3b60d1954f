"""The TrainBackend on FSDP2: device-agnostic, one data-parallel dimension, packed sequences."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from slime.backends.fsdp_utils import checkpoint
from slime.backends.fsdp_utils.arguments import FSDPConfig
from slime.backends.fsdp_utils.hf_names import hf_named_tensors
from slime.backends.fsdp_utils.lr_schedule import learning_rate
from slime.backends.fsdp_utils.model import (
    Precision,
    TokenModel,
    checkpoint_dtype,
    enable_gradient_checkpointing,
    load_causal_lm,
    shard,
)
from slime.config.run import RunConfig
from slime.data.packed import PackedBatch
from slime.training.backend import (
    LossFn,
    LossOutput,
    ModelTag,
    NamedTensor,
    ParallelLayout,
    StepMetrics,
    TokenOutputs,
)
from slime.weight_sync.disk import write_hf_directory

logger = logging.getLogger(__name__)


class FSDPBackend:
    """One rank. `torch.distributed` is initialised by whoever starts the process."""

    def __init__(self, run: RunConfig, fsdp: FSDPConfig, device: torch.device) -> None:
        self.run = run
        self.fsdp = fsdp
        self.device = device
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        rank, size = dist.get_rank(), dist.get_world_size()
        self.layout = ParallelLayout(rank=rank, world_size=size, data_rank=rank, data_size=size)
        self.models: dict[ModelTag, TokenModel] = {}
        self.export_dtype = checkpoint_dtype(run.hf_checkpoint, trust_remote_code=run.trust_remote_code)
        self.num_steps = 0
        torch.use_deterministic_algorithms(fsdp.deterministic_mode)

    # --- life-cycle

    def load(self) -> int:
        torch.manual_seed(self.run.seed)
        source = checkpoint.find_checkpoint(self.run.load, self.run.ckpt_step)
        reference = self._reference_checkpoint()
        actor = self._build(self._weights_directory(), train=True)
        self.models["actor"] = actor
        self.optimizer = _adamw(actor, self.run)
        first = 0
        if source is not None:
            first = self._restore(source)
        elif self.run.load is None or not _is_hf_directory(self.run.load):
            self._start_anew(reference)
        if self.run.needs_reference:
            self.models["ref"] = self._build_reference()
        return first

    def _start_anew(self, reference: Path | None) -> None:
        """First weights from the reference's checkpoint; those of a Hugging Face directory are loaded already."""
        if reference is not None:
            checkpoint.load_model(reference, self.models["actor"])
        if self.run.load is not None:
            start = reference or self._weights_directory()
            logger.info("--load %s holds no checkpoint: starting from %s", self.run.load, start)

    def _weights_directory(self) -> str:
        """The Hugging Face directory of the first weights."""
        for directory in (self.run.load, self.run.ref_load):
            if directory is not None and _is_hf_directory(directory):
                return directory
        return self.run.hf_checkpoint

    def _build(self, directory: str, *, train: bool) -> TokenModel:
        lm = load_causal_lm(
            directory,
            attn_implementation=self.fsdp.attn_implementation,
            trust_remote_code=self.run.trust_remote_code,
        )
        lm.eval()  # no dropout: the policy that is trained must be the one that was sampled
        model = TokenModel(
            lm,
            temperature=self.run.rollout_temperature,
            chunk_size=self.run.log_probs_chunk_size,
            share_prompts=self.fsdp.share_prompts,
        ).to(self.device)
        if train and self.fsdp.gradient_checkpointing:
            enable_gradient_checkpointing(lm)
        model.requires_grad_(train)
        return shard(model, self.mesh, Precision.choose(self.fsdp.bf16, self.device))

    def _reference_checkpoint(self) -> Path | None:
        """The checkpoint that --ref-load names; None where it names a Hugging Face directory, or is not given."""
        root = self.run.ref_load
        if root is None or _is_hf_directory(root):
            return None
        source = checkpoint.find_checkpoint(root, self.run.ref_ckpt_step)
        if source is None:
            raise checkpoint.CheckpointError(f"--ref-load {root} holds neither a model nor a checkpoint")
        return source

    def _build_reference(self) -> TokenModel:
        source = self._reference_checkpoint()
        is_hf = self.run.ref_load is not None and source is None
        model = self._build(self.run.ref_load if is_hf else self.run.hf_checkpoint, train=False)  # type: ignore[arg-type]
        if source is not None:
            checkpoint.load_model(source, model)
        return model

    def _restore(self, source: Path) -> int:
        """Load a checkpoint of this backend. Returns the first rollout id to run."""
        actor = self.models["actor"]
        checkpoint.load_model(source, actor)
        if self.run.finetune:
            return 0
        meta = checkpoint.read_meta(source)
        if not self.run.no_load_optim:
            checkpoint.load_optimizer(source, actor, self.optimizer)
        if not self.run.no_load_rng:
            checkpoint.load_rng(source)
        self.num_steps = meta.num_steps
        logger.info("loaded %s, %d optimizer steps", source, meta.num_steps)
        return meta.rollout_id + 1

    def save(self, rollout_id: int) -> None:
        assert self.run.save is not None
        optimizer = None if self.run.no_save_optim else self.optimizer
        meta = checkpoint.Meta(rollout_id=rollout_id, num_steps=self.num_steps)
        if self.run.save_hf is not None:
            directory = Path(self.run.save_hf.format(rollout_id=rollout_id))
            write_hf_directory(
                self.hf_tensors(),
                directory,
                assets=self.run.hf_checkpoint,
                is_writer=self.layout.is_reporter,
                is_durable=True,
            )
        checkpoint.save(self.run.save, meta, self.models["actor"], optimizer)

    def sleep(self) -> None:
        """Parameters, gradients and optimizer to host memory; on a CPU they are there already."""
        if self.device.type == "cuda":
            self._move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        if self.device.type == "cuda":
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for model in self.models.values():
            model.to(device)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    state[name] = value.to(device)

    # --- forward and backward

    def log_probs(self, batches: list[PackedBatch], model: ModelTag, *, entropy: bool) -> list[TokenOutputs]:
        with torch.no_grad():
            return [self.models[model](batch.to(self.device), entropy) for batch in batches]

    def train_step(self, batches: list[PackedBatch], loss: LossFn, *, entropy: bool) -> StepMetrics:
        actor = self.models["actor"]
        lr = learning_rate(self.num_steps, self.run, self._total_steps())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics = self._sum_metrics([self._backward(actor, batch, loss, entropy) for batch in batches])
        grad_norm = self._clip_gradients(actor)
        is_finite = all(torch.isfinite(torch.tensor([grad_norm, metrics["loss"]])))
        if is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad()  # gradients take no memory between steps
        self.num_steps += 1
        return StepMetrics(metrics, grad_norm, lr, skipped=not is_finite)

    def _backward(self, actor: TokenModel, batch: PackedBatch, loss: LossFn, entropy: bool) -> LossOutput:
        batch = batch.to(self.device)
        result = loss(actor(batch, entropy), batch, lambda values_T: _sequence_sum(values_T, batch))
        # FSDP averages gradients over ranks; a share of the step's loss must be added up instead.
        (result.loss * self.layout.data_size).backward()
        return result._replace(metrics=result.metrics | {"loss": result.loss.detach()})

    def _clip_gradients(self, actor: nn.Module) -> float:
        parameters = [parameter for parameter in actor.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.run.clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.clip_grad, norm)
        return float(norm)

    def _sum_metrics(self, results: list[LossOutput]) -> dict[str, float]:
        names = list(results[0].metrics)
        shares = torch.stack([torch.stack([result.metrics[name] for name in names]) for result in results])
        return dict(zip(names, self.sum_over_data_ranks(shares.sum(0)).tolist(), strict=True))

    def sum_over_data_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values.cpu()

    def _total_steps(self) -> int:
        return (self.run.num_rollout or 1) * (self.run.num_steps_per_rollout or 1)

    # --- weights

    def hf_tensors(self) -> Iterator[NamedTensor]:
        return hf_named_tensors(
            self.models["actor"].lm, dtype=self.export_dtype, bucket_bytes=self.run.update_weight_buffer_size
        )


def _sequence_sum(values_T: Tensor, batch: PackedBatch) -> Tensor:
    return values_T.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, values_T)


def _adamw(model: nn.Module, run: RunConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as is usual for transformers."""
    by_rank = sorted(model.parameters(), key=lambda parameter: parameter.ndim < 2)
    groups = [
        {"params": list(members), "weight_decay": 0.0 if is_vector else run.weight_decay}
        for is_vector, members in itertools.groupby(by_rank, key=lambda parameter: parameter.ndim < 2)
    ]
    betas = (run.adam_beta1, run.adam_beta2)
    return torch.optim.AdamW(groups, lr=run.lr, betas=betas, eps=run.adam_eps, fused=True)


def _is_hf_directory(path: str) -> bool:
    return (Path(path) / "config.json").is_file()
