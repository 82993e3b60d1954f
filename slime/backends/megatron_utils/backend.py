"""The TrainBackend on Megatron-core: its models, schedules and optimizer under slime's recipe."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn
from transformers import AutoConfig

from slime.backends.megatron_utils import checkpoint, sources, transformer
from slime.backends.megatron_utils.arguments import MegatronConfig
from slime.backends.megatron_utils.compiled_layer import can_compile
from slime.backends.megatron_utils.folders import Meta, read_meta
from slime.backends.megatron_utils.freeze import freeze
from slime.backends.megatron_utils.gather import gathered_tensors
from slime.backends.megatron_utils.head import TokenHead, ValueHead
from slime.backends.megatron_utils.host_models import HostModels
from slime.backends.megatron_utils.model import (
    build_chunk,
    in_half_precision,
    read_weights,
)
from slime.backends.megatron_utils.names import HFDirectory, check_checkpoint, read_shape
from slime.backends.megatron_utils.optimizer import (
    forget,
    gradient_buffers,
    make_optimizer,
    scalers_of,
    set_rates,
    state_tensors,
    step_if_finite,
    without_reduction,
)
from slime.backends.megatron_utils.packing import Split
from slime.backends.megatron_utils.parallel import (
    is_last_stage,
    open_groups,
)
from slime.backends.megatron_utils.passes import Passes, add_up_gradients
from slime.backends.megatron_utils.routers import attach_routing_replay
from slime.backends.megatron_utils.sources import Source
from slime.backends.megatron_utils.stages import num_virtual_stages
from slime.backends.shared.export import exported_dtype
from slime.backends.shared.lr_schedule import continued, learning_rate, schedule_of, weight_decay
from slime.backends.shared.offload import HostCopy, on_host
from slime.backends.shared.routing_replay import MISMATCH, mismatch
from slime.backends.shared.saver import Saver
from slime.backends.shared.target_log_probs import LogitRule
from slime.config.run import RunConfig
from slime.data.packed import PackedBatch
from slime.training.backend import POLICY, LossFn, ModelTag, NamedTensor, StepMetrics, TokenOutputs, Wants
from slime.utils.misc import load_function

logger = logging.getLogger(__name__)

Role = Literal["actor", "critic"]
_STORE_PREFIX: dict[ModelTag, str] = {
    "actor": "",
    "critic": "",
    "ref": "ref_",
    "old_actor": "old_",
    "teacher": "teacher_",
}


class MegatronBackend:
    """One rank. `torch.distributed` is initialised by whoever starts the process."""

    def __init__(
        self,
        run: RunConfig,
        cfg: MegatronConfig,
        device: torch.device,
        *,
        dtype: torch.dtype,
        transformer_engine: bool = False,
        torch_compile: bool = False,
        role: Role = "actor",
    ) -> None:
        """dtype: of weights and computation; optimizer state is float32. role: a critic's `run` is `critic_run`.

        torch_compile: of layers, where they are such as can be.
        """
        self.role: Role = role
        self.run = run
        self.cfg = cfg
        self.device = device
        self.dtype = dtype
        self.shape = read_shape(run.hf_checkpoint)
        self.layout = open_groups(cfg, run, num_virtual=num_virtual_stages(cfg, self.shape.num_layers))
        self.split = Split(
            context_rank=parallel_state.get_context_parallel_rank(),
            context_size=run.context_parallel_size,
            tensor_size=cfg.tensor_model_parallel_size if cfg.sequence_parallel else 1,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank() if cfg.sequence_parallel else 0,
        )
        self.transformer_engine = transformer_engine
        self.config = transformer.transformer_config(
            self.shape,
            cfg,
            context_size=run.context_parallel_size,
            dtype=dtype,
            device=device,
            transformer_engine=transformer_engine,
        )
        self.is_compiled = torch_compile and self._can_compile()
        self.host_copy = HostCopy()
        self.export_dtype = self._export_dtype()
        self.saver = Saver(run, is_writer=self.layout.is_reporter)
        self.num_steps = 0

    def _export_dtype(self) -> torch.dtype:
        """That of the Hugging Face model, float32 where its config.json names none."""
        named = AutoConfig.from_pretrained(self.run.hf_checkpoint, trust_remote_code=self.run.trust_remote_code).dtype
        return named if isinstance(named, torch.dtype) else torch.float32

    def _can_compile(self) -> bool:
        is_plain = not (self.transformer_engine or self.shape.sandwich_norms)
        is_compiled = is_plain and can_compile(self.config, transformer.ddp_config(self.cfg))
        if not is_compiled:
            logger.warning("--torch-compile has no effect: see docs/megatron.md for the layers that are compiled")
        return is_compiled

    # --- life-cycle

    def load(self) -> int:
        self.chunk = build_chunk(
            self.config,
            self.shape,
            transformer.model_options(self.shape, self.cfg, is_critic=self.role == "critic"),
            transformer_engine=self.transformer_engine,
            compiled=self.is_compiled,
            device=self.device,
            provider_path=self.cfg.custom_model_provider_path,
        )
        self.others = HostModels(self.chunk)
        is_critic = self.role == "critic"
        replayed = self.chunk.lms if self.run.use_routing_replay and not is_critic else []
        self.replays = [attach_routing_replay(lm, self.config) for lm in replayed]
        head = self._head() if is_last_stage() else None
        source = sources.critic_source(self.run) if is_critic else sources.actor_source(self.run)
        self._read(source)
        if not is_critic:
            freeze(self.chunk, self.shape, self.run)
        self.chunk.wrapped = [self._wrapped(lm, is_first=index == 0) for index, lm in enumerate(self.chunk.lms)]
        self.passes = Passes(
            self.chunk.wrapped,
            self.split,
            self.device,
            head=head,
            is_critic=is_critic,
            replays=self.replays,
            lengths_on_device=self.transformer_engine,
        )
        optimizer_config = transformer.optimizer_config(self.run, self.cfg, dtype=self.dtype)
        self.optimizer = make_optimizer(optimizer_config, self.chunk.wrapped, host_share=self.cfg.host_share)
        self.config.finalize_model_grads_func = add_up_gradients
        if self.cfg.overlap_grad_reduce:
            self.config.no_sync_func = partial(without_reduction, self.chunk.wrapped)
        if scalers_of(self.optimizer):
            self.config.grad_scale_func = self.optimizer.scale_loss
        continued = self._continued(source)
        if self.role == "actor":
            self._load_frozen(source.path if continued is not None else None)
        return 0 if continued is None else continued.rollout_id + 1

    def _read(self, source: Source) -> None:
        """Overwrite the model's weights."""
        if source.is_checkpoint:
            checkpoint.read_weights(source.path, self.chunk, self.shape, is_critic=self.role == "critic")
            return
        files = HFDirectory(source.path)
        check_checkpoint(self.shape, files.shapes)
        own_head = "output_layer." if self.role == "critic" else None
        read_weights(self.chunk, self.shape, files.read, but_for=own_head)

    def _continued(self, source: Source) -> Meta | None:
        """Restore what the run's own checkpoint holds besides weights; None where the run starts anew."""
        meta = read_meta(source.path) if source.is_own and source.is_checkpoint else None
        if meta is None or self.run.finetune:
            return None
        if not self.run.no_load_optim:
            checkpoint.read_optimizer(source.path, self.chunk, self.optimizer)
        if not self.run.no_load_rng:
            checkpoint.read_rng(source.path)
        self.run = continued(self.run, meta.schedule, self._total_steps())
        self.num_steps = meta.num_steps
        logger.info("loaded %s, %d optimizer steps", source.path, meta.num_steps)
        return meta

    def _load_frozen(self, continued: Path | None) -> None:
        """The models that the actor is compared with; those that a continued run had moved, from its checkpoint."""
        wanted: dict[ModelTag, Source] = {}
        if self.run.needs_reference:
            wanted["ref"] = sources.reference_source(self.run)
        if self.run.needs_teacher and self.run.opd_teacher_load is not None:
            wanted["teacher"] = sources.teacher_source(self.run)
        moved: tuple[ModelTag, ...] = ("ref", "old_actor")
        for tag in moved:
            if continued is not None and (continued / tag).is_dir():
                wanted[tag] = Source(continued / tag, is_checkpoint=True)
                self.others.moved.add(tag)
        self.others.load(wanted, self._read)

    def _head(self) -> TokenHead | ValueHead:
        if self.role == "critic":
            return ValueHead(self.chunk.lms[-1])
        rule = LogitRule(self.run.rollout_temperature, None, self.run.log_probs_chunk_size)
        return TokenHead(self.chunk.lms[-1], vocab_size=self.shape.vocab_size, rule=rule)

    def _wrapped(self, lm: nn.Module, *, is_first: bool) -> nn.Module:
        """is_first: only of the first stage gradients are worth adding up in several parts; its backward ends last."""
        half = lm if self.dtype == torch.float32 else in_half_precision(self.config, lm)
        settings = transformer.ddp_config(self.cfg)
        wrapped: nn.Module = DistributedDataParallel(self.config, settings, half, disable_bucketing=not is_first)
        return wrapped

    def save(self, rollout_id: int) -> None:
        run = self.run
        assert run.save is not None
        meta = Meta(rollout_id, self.num_steps, schedule_of(run, self._total_steps()), self.role)
        part_of = partial(checkpoint.part_of, self.chunk, kind=self.cfg.ckpt_format, iteration=rollout_id)
        parts = {"": part_of(None if run.no_save_optim else self.optimizer)}
        for tag in sorted(self.others.moved):
            with self.others.in_place(tag):
                parts[tag] = on_host(part_of())
        content = checkpoint.Content(meta, parts, checkpoint.random_numbers())
        write = partial(checkpoint.save, run.save)
        self.saver.save(rollout_id, content, write=write, tensors=self.hf_tensors())

    def finish_save(self) -> None:
        self.saver.finish()

    def sleep(self) -> None:
        """Weights and optimizer to host memory; on a CPU they are there already. Gradients are given up."""
        if self.device.type == "cuda":
            for buffer in gradient_buffers(self.chunk.wrapped):
                buffer.untyped_storage().resize_(0)
            num_bytes = self.host_copy.store(self._tensors())
            torch.cuda.empty_cache()
            left = torch.cuda.memory_allocated(self.device)
            logger.info("asleep: %.2f GiB on the host, %.2f GiB left on the GPU", num_bytes / 2**30, left / 2**30)

    def wake_up(self) -> None:
        self.host_copy.restore()
        if self.device.type == "cuda":
            for buffer in gradient_buffers(self.chunk.wrapped):
                buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.chunk.weights().values()
        yield from state_tensors(self.optimizer)

    # --- forward and backward

    def log_probs(self, batches: list[PackedBatch], model: ModelTag, *, entropy: bool) -> list[TokenOutputs]:
        with self.others.in_place(model):
            self._call_hook(self.cfg.custom_megatron_before_log_prob_hook_path, _STORE_PREFIX[model])
            return self.passes.outputs(batches, entropy=entropy, replayed=model in POLICY)

    def train_step(self, batches: list[PackedBatch], loss: LossFn, *, wants: Wants) -> StepMetrics:
        self.saver.check()
        for stage in self.chunk.wrapped:
            stage.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = learning_rate(self.num_steps, self.run, self._total_steps())
        position = divmod(self.num_steps, self.run.num_steps_per_rollout or 1)
        if self.run.reset_optimizer_states and position[1] == 0:
            forget(self.optimizer)
        decay = weight_decay(self.num_steps, self.run, self._total_steps())
        set_rates(self.optimizer, lr=lr, weight_decay=decay)
        self._call_hook(self.cfg.custom_megatron_before_train_step_hook_path, *position, optimizer=True)
        metrics = self.passes.gradients(batches, loss, wants=wants)
        if self.replays:
            metrics[MISMATCH] = mismatch(self.replays, self.device)
        step = step_if_finite(
            self.optimizer, clip_grad=self.run.clip_grad, is_loss_finite=math.isfinite(metrics["loss"])
        )
        self.optimizer.zero_grad()
        self.num_steps += 1
        return StepMetrics(metrics, step.grad_norm, lr, step.skipped, step.loss_scale, step.overflowed)

    def sum_over_data_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return values.cpu()

    def _call_hook(self, path: str | None, *position: Any, optimizer: bool = False) -> None:
        """A user's function, as the pages on plug-ins say: the model is a list of this rank's stages."""
        if path is None:
            return
        models = self.chunk.wrapped
        if optimizer:
            schedule = partial(learning_rate, cfg=self.run, total_steps=self._total_steps())
            load_function(path)(self.run, *position, models, self.optimizer, schedule)
        else:
            load_function(path)(self.run, models, *position)

    def _total_steps(self) -> int:
        return (self.run.num_rollout or 1) * (self.run.num_steps_per_rollout or 1)

    # --- weights

    def hf_tensors(self) -> Iterator[NamedTensor]:
        bucket_bytes = self.run.update_weight_buffer_size
        with self.host_copy.lend(self.chunk.weights().values()):  # also while asleep
            for name, tensor in gathered_tensors(self.chunk, self.shape, bucket_bytes=bucket_bytes):
                yield NamedTensor(name, tensor.to(exported_dtype(name, self.export_dtype)))

    def copy_weights(self, source: ModelTag, target: ModelTag) -> None:
        with self.host_copy.lend(self.chunk.weights().values()):
            self.others.copy(source, target)
