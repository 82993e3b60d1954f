"""The TrainBackend on FSDP2: device-agnostic, packed sequences; ranks share samples, and each sample's tokens.

Parameters are sharded over all ranks, whatever these share.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from slime.backends.fsdp_utils import checkpoint, sources
from slime.backends.fsdp_utils.arguments import FSDPConfig
from slime.backends.fsdp_utils.build import Builder, Model, Role, copy_tensors
from slime.backends.fsdp_utils.context_parallel import context_group
from slime.backends.fsdp_utils.hf_names import hf_named_tensors
from slime.backends.fsdp_utils.model import TokenModel, checkpoint_dtype, empty_like, reshard
from slime.backends.fsdp_utils.optimizer import LossScale, adamw, clip_gradients, forget, is_decayed
from slime.backends.fsdp_utils.sources import Source
from slime.backends.shared.lr_schedule import continued, learning_rate, schedule_of, weight_decay
from slime.backends.shared.offload import HostCopy, Parking
from slime.backends.shared.routing_replay import MISMATCH, mismatch
from slime.backends.shared.saver import Saver
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

logger = logging.getLogger(__name__)


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
        rank, size, context_size = dist.get_rank(), dist.get_world_size(), run.context_parallel_size
        self.layout = ParallelLayout(
            rank=rank,
            world_size=size,
            data_rank=rank // context_size,
            data_size=size // context_size,
            context_size=context_size,
        )
        context = context_group(context_size, timeout_minutes=run.distributed_timeout_minutes)
        self.build = Builder(run, fsdp, device, self.mesh, context, role)
        self.models: dict[ModelTag, Model] = {}
        self.copies: set[ModelTag] = set()  # models that moved since they were loaded: a checkpoint holds them too
        self.export_dtype = checkpoint_dtype(run.hf_checkpoint, trust_remote_code=run.trust_remote_code)
        self.num_steps = 0
        self.loss_scale = LossScale(run.initial_loss_scale, run.loss_scale_window) if run.fp16 else LossScale()
        self.host_copy = HostCopy()
        self.saver = Saver(run, is_writer=self.layout.is_reporter)
        self.parking = Parking(is_wanted=fsdp.offload_ref)
        torch.use_deterministic_algorithms(fsdp.deterministic_mode)

    # --- life-cycle

    def load(self) -> int:
        torch.manual_seed(self.run.seed)
        source = sources.critic_source(self.run) if self.role == "critic" else sources.actor_source(self.run)
        self.models[self.role] = model = self.build.load(source, self.role)
        self.optimizer = adamw(model, self.run)
        first = self._continue(source.checkpoint) if source.checkpoint and source.is_continued else 0
        if self.role == "actor":
            self._load_frozen(source)
        return first

    def _load_frozen(self, source: Source) -> None:
        """The models that the actor is compared with; those that a continued run had moved, from its checkpoint."""
        run = self.run
        if run.needs_reference:
            self._load_parked(sources.reference_source(run), "ref")
        if run.needs_teacher and run.opd_teacher_load is not None:
            teacher = sources.teacher_source(run)
            sources.check_same_tokens(run.hf_checkpoint, teacher.directory, trust_remote_code=run.trust_remote_code)
            self._load_parked(teacher, "teacher")
        wanted: dict[ModelTag, bool] = {"ref": run.needs_reference, "old_actor": run.keep_old_actor}
        for tag in [tag for tag, is_wanted in wanted.items() if is_wanted]:
            if source.checkpoint is not None and source.is_continued and (source.checkpoint / tag).is_dir():
                self.copy_weights("actor", tag)
                with self.parking.writing(tag, self.models[tag]):
                    checkpoint.load_model(source.checkpoint, self.models[tag], part=tag)

    def _load_parked(self, source: Source, tag: ModelTag) -> None:
        self.models[tag] = self.build.load(source, tag)
        self.parking.park(tag, self.models[tag])

    def _continue(self, folder: Path) -> int:
        """Restore what a checkpoint holds besides weights. Returns the first rollout id to run."""
        meta = checkpoint.read_meta(folder)
        if not self.run.no_load_optim:
            checkpoint.load_optimizer(folder, self.models[self.role], self.optimizer)
        if not self.run.no_load_rng:
            checkpoint.load_rng(folder)
        self.num_steps = meta.num_steps
        self.run = continued(self.run, meta.schedule, self._total_steps())
        if self.run.fp16 and meta.loss_scale is not None:
            self.loss_scale.value, self.loss_scale.num_good = meta.loss_scale
        logger.info("loaded %s, %d optimizer steps", folder, meta.num_steps)
        return meta.rollout_id + 1

    def save(self, rollout_id: int) -> None:
        assert self.run.save is not None
        optimizer = None if self.run.no_save_optim else self.optimizer
        scale = (self.loss_scale.value, self.loss_scale.num_good) if self.run.fp16 else None
        schedule = schedule_of(self.run, self._total_steps())
        meta = checkpoint.Meta(rollout_id, self.num_steps, loss_scale=scale, schedule=schedule)
        copies = {str(tag): self.models[tag] for tag in sorted(self.copies)}
        with contextlib.ExitStack() as stack:
            for tag, model in copies.items():
                stack.enter_context(self.parking.reading(tag, model))
            content = checkpoint.content_of(meta, self.models[self.role], optimizer, copies)
            write = partial(checkpoint.save, self.run.save)
            self.saver.save(rollout_id, content, write=write, tensors=self.hf_tensors())

    def finish_save(self) -> None:
        self.saver.finish()

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
        with torch.no_grad(), self.parking.reading(model, self.models[model]):
            outputs = [self._outputs(self.models[model], batch, wants) for batch in batches]
        reshard(self.models[model])
        return outputs

    def _outputs(self, model: Model, batch: PackedBatch, wants: Wants) -> TokenOutputs:
        outputs: TokenOutputs = model(batch.to(self.device), wants)
        if isinstance(model, TokenModel) and model.replay is not None:
            model.replay.tell(batch)
        return outputs

    def train_step(self, batches: list[PackedBatch], loss: LossFn, *, wants: Wants) -> StepMetrics:
        parameters = self.models[self.role].parameters()
        self.saver.check()
        lr = self._begin_step()
        metrics = self._sum_metrics([self._backward(batch, loss, wants) for batch in batches])
        replay = self._policy("actor").replay if self.role == "actor" else None
        if replay is not None:
            metrics[MISMATCH] = mismatch([replay], self.device)
        scale = self.loss_scale.value
        grad_norm = clip_gradients(parameters, self.run.clip_grad, scale=scale)
        is_finite = all(torch.isfinite(torch.tensor([grad_norm, metrics["loss"]])))
        if is_finite:
            self.optimizer.step()
        self.optimizer.zero_grad()  # gradients take no memory between steps
        self.num_steps += 1
        overflowed = self.loss_scale.explains(loss=metrics["loss"], grad_norm=grad_norm)
        self.loss_scale.update(overflowed=overflowed)
        shown = scale if self.run.fp16 else None
        return StepMetrics(metrics, grad_norm, lr, skipped=not is_finite, loss_scale=shown, overflowed=overflowed)

    def _begin_step(self) -> float:
        """Returns the learning rate of the step."""
        if self.run.reset_optimizer_states and self.num_steps % (self.run.num_steps_per_rollout or 1) == 0:
            forget(self.optimizer)
        lr = learning_rate(self.num_steps, self.run, self._total_steps())
        decay = weight_decay(self.num_steps, self.run, self._total_steps())
        for group in self.optimizer.param_groups:
            group |= {"lr": lr, "weight_decay": decay if is_decayed(group["params"][0]) else 0.0}
        return lr

    def _backward(self, batch: PackedBatch, loss: LossFn, wants: Wants) -> LossOutput:
        batch = batch.to(self.device)
        result = loss(self.models[self.role](batch, wants), batch, lambda values_T: _sequence_sum(values_T, batch))
        # FSDP averages gradients over all ranks. They must be added up instead: of shares of the step's loss and, where
        # ranks share its tokens, of what each of them took of the gradient of the same loss.
        (result.loss * (self.layout.world_size * self.loss_scale.value)).backward()
        return result._replace(metrics=result.metrics | {"loss": result.loss.detach()})

    def _sum_metrics(self, results: list[LossOutput]) -> dict[str, float]:
        names = list(results[0].metrics)
        shares = torch.stack([torch.stack([result.metrics[name] for name in names]) for result in results])
        return dict(zip(names, self.sum_over_data_ranks(shares.sum(0)).tolist(), strict=True))

    def sum_over_data_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)  # over all ranks, so that none decides otherwise because of its rounding
        return values.cpu() / self.layout.context_size

    def _total_steps(self) -> int:
        return (self.run.num_rollout or 1) * (self.run.num_steps_per_rollout or 1)

    # --- weights

    def hf_tensors(self) -> Iterator[NamedTensor]:
        lm = self._policy("actor").lm
        with self.host_copy.lend(itertools.chain(lm.parameters(), lm.buffers())):  # also while asleep
            yield from hf_named_tensors(lm, dtype=self.export_dtype, bucket_bytes=self.run.update_weight_buffer_size)

    def copy_weights(self, source: ModelTag, target: ModelTag) -> None:
        if target not in self.models:
            self.models[target] = self.build.sharded(empty_like(self._policy(source).lm), target)
        with self.parking.writing(target, self.models[target]):
            copy_tensors(self.models[source], self.models[target], f"{source} to {target}")
        self.copies.add(target)

    def _policy(self, tag: ModelTag) -> TokenModel:
        model = self.models[tag]
        assert isinstance(model, TokenModel), f"{tag} has no token probabilities"
        return model


def _sequence_sum(values_T: Tensor, batch: PackedBatch) -> Tensor:
    return values_T.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, values_T)
