"""The TrainBackend on FSDP2: device-agnostic, one data-parallel dimension, packed sequences."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from slime.backends.fsdp_utils import checkpoint, sources
from slime.backends.fsdp_utils.arguments import FSDPConfig
from slime.backends.fsdp_utils.hf_names import hf_named_tensors
from slime.backends.fsdp_utils.model import (
    TokenModel,
    checkpoint_dtype,
    compile_each,
    compute_dtype,
    decoder_layers,
    empty_like,
    enable_gradient_checkpointing,
    load_causal_lm,
    shard,
    wants_compilation,
)
from slime.backends.fsdp_utils.sources import Source
from slime.backends.fsdp_utils.value_model import ValueModel, shard_critic
from slime.backends.shared.lr_schedule import learning_rate
from slime.backends.shared.offload import HostCopy
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
    Wants,
)
from slime.weight_sync.disk import write_hf_directory

logger = logging.getLogger(__name__)


Role = Literal["actor", "critic"]
Model = TokenModel | ValueModel


class FSDPBackend:
    """One rank. `torch.distributed` is initialised by whoever starts the process.

    role: what is trained. A critic's `run` is `critic_run` of the actor's.
    """

    def __init__(self, run: RunConfig, fsdp: FSDPConfig, device: torch.device, *, role: Role = "actor") -> None:
        self.run = run
        self.fsdp = fsdp
        self.device = device
        self.role = role
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        rank, size = dist.get_rank(), dist.get_world_size()
        self.layout = ParallelLayout(rank=rank, world_size=size, data_rank=rank, data_size=size)
        self.models: dict[ModelTag, Model] = {}
        self.copies: set[ModelTag] = set()  # models that moved since they were loaded: a checkpoint holds them too
        self.export_dtype = checkpoint_dtype(run.hf_checkpoint, trust_remote_code=run.trust_remote_code)
        self.num_steps = 0
        self.host_copy = HostCopy()
        torch.use_deterministic_algorithms(fsdp.deterministic_mode)

    # --- life-cycle

    def load(self) -> int:
        torch.manual_seed(self.run.seed)
        source = sources.critic_source(self.run) if self.role == "critic" else sources.actor_source(self.run)
        self.models[self.role] = model = self._load_model(source, self.role)
        self.optimizer = _adamw(model, self.run)
        first = self._continue(source.checkpoint) if source.checkpoint and source.is_continued else 0
        if self.role == "actor":
            self._load_frozen(source)
        return first

    def _load_model(self, source: Source, tag: ModelTag) -> Model:
        lm = load_causal_lm(
            source.directory,
            attn_implementation=self.fsdp.attn_implementation,
            trust_remote_code=self.run.trust_remote_code,
        )
        model = self._sharded(lm, tag)
        if source.checkpoint is not None:
            checkpoint.load_model(source.checkpoint, model)
        return model

    def _sharded(self, lm: PreTrainedModel, tag: ModelTag) -> Model:
        """`lm` as the model that `tag` wants, on the device; only that of the role is trained."""
        lm.eval()  # no dropout: the policy that is trained must be the one that was sampled
        lm.requires_grad_(tag == self.role)
        if tag == self.role and self.fsdp.gradient_checkpointing:
            enable_gradient_checkpointing(lm)
        layers = decoder_layers(lm)
        if wants_compilation(self.fsdp.torch_compile, self.device):
            compile_each(layers)
        compute = compute_dtype(self.fsdp.bf16, self.device)
        if tag == "critic":
            critic = ValueModel(lm, share_prompts=self.fsdp.share_prompts).to(self.device)
            shard_critic(critic, layers, mesh=self.mesh, compute=compute)
            return critic
        model = TokenModel(
            lm,
            temperature=self.run.rollout_temperature,
            chunk_size=self.run.log_probs_chunk_size,
            share_prompts=self.fsdp.share_prompts,
        ).to(self.device)
        shard(model, layers, mesh=self.mesh, compute=compute)
        return model

    def _load_frozen(self, source: Source) -> None:
        """The models that the actor is compared with; those that a continued run had moved, from its checkpoint."""
        run = self.run
        if run.needs_reference:
            self.models["ref"] = self._load_model(sources.reference_source(run), "ref")
        if run.needs_teacher and run.opd_teacher_load is not None:
            teacher = sources.teacher_source(run)
            sources.check_same_tokens(run.hf_checkpoint, teacher.directory, trust_remote_code=run.trust_remote_code)
            self.models["teacher"] = self._load_model(teacher, "teacher")
        wanted: dict[ModelTag, bool] = {"ref": run.needs_reference, "old_actor": run.keep_old_actor}
        for tag in [tag for tag, is_wanted in wanted.items() if is_wanted]:
            if source.checkpoint is not None and source.is_continued and (source.checkpoint / tag).is_dir():
                self.copy_weights("actor", tag)
                checkpoint.load_model(source.checkpoint, self.models[tag], part=tag)

    def _continue(self, folder: Path) -> int:
        """Restore what a checkpoint holds besides weights. Returns the first rollout id to run."""
        meta = checkpoint.read_meta(folder)
        if not self.run.no_load_optim:
            checkpoint.load_optimizer(folder, self.models[self.role], self.optimizer)
        if not self.run.no_load_rng:
            checkpoint.load_rng(folder)
        self.num_steps = meta.num_steps
        logger.info("loaded %s, %d optimizer steps", folder, meta.num_steps)
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
        copies: dict[str, nn.Module] = {tag: self.models[tag] for tag in sorted(self.copies)}
        checkpoint.save(self.run.save, meta, self.models[self.role], optimizer, copies=copies)

    def sleep(self) -> None:
        """Parameters and optimizer to host memory; on a CPU they are there already. No gradient outlives a step."""
        if self.device.type == "cuda":
            num_bytes = self.host_copy.store(self._tensors())
            torch.cuda.empty_cache()
            left = torch.cuda.memory_allocated(self.device)
            logger.info("asleep: %.2f GiB on the host, %.2f GiB left on the GPU", num_bytes / 2**30, left / 2**30)

    def wake_up(self) -> None:
        self.host_copy.restore()

    def _tensors(self) -> Iterator[Tensor]:
        for model in self.models.values():
            yield from itertools.chain(model.parameters(), model.buffers())
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    # --- forward and backward

    def log_probs(self, batches: list[PackedBatch], model: ModelTag, *, entropy: bool) -> list[TokenOutputs]:
        wants = Wants(entropy=entropy)
        with torch.no_grad():
            outputs = [self.models[model](batch.to(self.device), wants) for batch in batches]
        # FSDP keeps its last group whole for a backward that does not come: memory, and weights no copy would reach.
        cast(FSDPModule, self.models[model]).reshard()
        return outputs

    def train_step(self, batches: list[PackedBatch], loss: LossFn, *, wants: Wants) -> StepMetrics:
        model = self.models[self.role]
        lr = learning_rate(self.num_steps, self.run, self._total_steps())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        metrics = self._sum_metrics([self._backward(model, batch, loss, wants) for batch in batches])
        grad_norm = self._clip_gradients(model)
        is_finite = all(torch.isfinite(torch.tensor([grad_norm, metrics["loss"]])))
        if is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad()  # gradients take no memory between steps
        self.num_steps += 1
        return StepMetrics(metrics, grad_norm, lr, skipped=not is_finite)

    def _backward(self, model: Model, batch: PackedBatch, loss: LossFn, wants: Wants) -> LossOutput:
        batch = batch.to(self.device)
        result = loss(model(batch, wants), batch, lambda values_T: _sequence_sum(values_T, batch))
        # FSDP averages gradients over ranks; a share of the step's loss must be added up instead.
        (result.loss * self.layout.data_size).backward()
        return result._replace(metrics=result.metrics | {"loss": result.loss.detach()})

    def _clip_gradients(self, model: nn.Module) -> float:
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
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
        lm = self._policy("actor").lm
        with self.host_copy.lend(itertools.chain(lm.parameters(), lm.buffers())):  # also while asleep
            yield from hf_named_tensors(lm, dtype=self.export_dtype, bucket_bytes=self.run.update_weight_buffer_size)

    def copy_weights(self, source: ModelTag, target: ModelTag) -> None:
        if target not in self.models:
            self.models[target] = self._sharded(empty_like(self._policy(source).lm), target)
        _copy_tensors(self.models[source], self.models[target], f"{source} to {target}")
        self.copies.add(target)

    def _policy(self, tag: ModelTag) -> TokenModel:
        model = self.models[tag]
        assert isinstance(model, TokenModel), f"{tag} has no token probabilities"
        return model


@torch.no_grad()
def _copy_tensors(source: nn.Module, target: nn.Module, what: str) -> None:
    """Every rank copies its shards. Raises ValueError for models of different shapes."""
    tensors = [dict(itertools.chain(model.named_parameters(), model.named_buffers())) for model in (source, target)]
    shapes = [{name: tuple(tensor.shape) for name, tensor in named.items()} for named in tensors]
    if different := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        ours, theirs = (named.get(different[0], "none") for named in shapes)
        raise ValueError(f"weights cannot be copied from {what}: tensor {different[0]} has shapes {ours} and {theirs}")
    for name, tensor in tensors[1].items():
        tensor.copy_(tensors[0][name])


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
