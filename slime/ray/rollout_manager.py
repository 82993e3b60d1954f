"""The actor that samples: prompts from the data source, samples from the rollout function, a batch for the trainers."""

from __future__ import annotations

import dataclasses
import logging
import time
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import ray
from ray import ObjectRef

from slime.arguments import Args
from slime.data.batch import TrainBatch, batch_from_samples
from slime.data.convert import batch_from_dict
from slime.observability import details
from slime.observability.metrics import eval_metrics, rollout_metrics
from slime.observability.trajectories import write_samples
from slime.ray.actors import CONTROL, LIFETIME
from slime.ray.watchdog import thread_stacks
from slime.rollout.background import raise_first_failure
from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, call_rollout_fn
from slime.rollout.debug_data import save_rollout
from slime.rollout.eval_data import samples_per_prompt
from slime.rollout.hooks import logs_eval_itself, logs_rollout_itself
from slime.rollout.staleness import check_on_policy, without_stale
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.logging import configure_logging
from slime.utils.misc import load_function
from slime.utils.processes import raise_open_file_limit
from slime.utils.types import Sample

logger = logging.getLogger(__name__)


class RolloutResult(NamedTuple):
    """batch: a TrainBatch in the object store. metrics: `rollout/*` and `perf/*`."""

    batch: ObjectRef
    metrics: dict[str, float]


class RolloutManager:
    """Owns the data source, runs the rollout functions. It knows neither engines' life-cycle nor trainers' layout."""

    def __init__(self, args: Args, run_dir: str) -> None:
        configure_logging(args.log_level)
        raise_open_file_limit()
        self.args = args
        self.run_dir = Path(run_dir)

    def prepare(self) -> int:
        """Load plug-ins and prompts. Returns the number of prompts of an epoch. Raises ValueError for what is wrong."""
        args = self.args
        self.generate_function = load_function(args.rollout_function_path)
        self.eval_function = load_function(args.eval_function_path or args.rollout_function_path)
        plugins = (
            args.custom_generate_function_path,
            args.custom_rm_path,
            args.dynamic_sampling_filter_path,
            args.rollout_sample_filter_path,
            args.rollout_all_samples_process_path,
            args.custom_rollout_log_function_path,
            args.custom_eval_rollout_log_function_path,
            args.custom_reward_post_process_path,
            args.custom_convert_samples_to_train_data_path,
        )
        for path in (*plugins, *(args.rollout_sample_hook_path or [])):
            if path is not None:
                load_function(path)
        self.tokenizer = tokenizer_of(args)
        self.data_source = load_function(args.data_source_path)(args)
        if args.partial_rollout:
            self.data_source.add_samples([])  # one that takes nothing back says so now
        return len(self.data_source)

    def set_runtime(self, num_rollout: int, routers: dict[str, tuple[str, int]] | None) -> None:
        """What plug-ins read from `args` and only a started run knows.

        routers: host and port of each model's router, by its name, if there are engines.
        """
        host, port = routers[self.args.policy.name] if routers is not None else (None, None)
        self.args = dataclasses.replace(
            self.args,
            num_rollout=num_rollout,
            sglang_router_ip=host,
            sglang_router_port=port,
            sglang_model_routers=routers or {},
        )

    def generate(self, rollout_id: int, weight_version: int) -> RolloutResult:
        """One rollout, scored and laid out for training. weight_version: what the engines hold now."""
        start = time.monotonic()
        function = self.generate_function
        known = {"weight_version": weight_version} if "weight_version" in signature(function).parameters else {}
        output = call_rollout_fn(function, self.args, rollout_id, self.data_source, evaluation=False, **known)
        assert isinstance(output, RolloutFnTrainOutput)
        groups, stale = without_stale(self.args, rollout_id, output.samples, self.data_source)
        if self.args.true_on_policy_mode:
            check_on_policy(groups, weight_version)
        if self.args.save_debug_rollout_data is not None:
            save_rollout(self.args.save_debug_rollout_data, rollout_id, groups, weight_version=weight_version)
        samples = [sample for group in groups for sample in group]
        raw_rewards, batch = self._training_data(samples)
        seconds, extra = time.monotonic() - start, (output.metrics or {}) | stale
        self._write_samples(rollout_id, samples, raw_rewards)
        if logs_rollout_itself(self.args, rollout_id, samples, extra_metrics=extra, seconds=seconds):
            return RolloutResult(ray.put(batch), {})
        metrics = rollout_metrics(
            samples,
            raw_rewards,
            seconds=seconds,
            num_gpus=max(1, self.args.policy.num_gpus),
            weight_version=rollout_id,
        )
        return RolloutResult(ray.put(batch), metrics | self._details(samples, raw_rewards) | extra)

    def _details(self, samples: list[Sample], rewards: list[float]) -> dict[str, float]:
        """Metrics that the settings ask for."""
        args = self.args
        metrics: dict[str, float] = {}
        if args.log_passrate:
            metrics |= details.pass_rates(samples, rewards)
        if args.log_multi_turn:
            metrics |= details.multi_turn(samples)
        if args.log_correct_samples:
            metrics |= details.correct_samples(samples, rewards)
        if args.log_reward_category is not None:
            metrics |= details.reward_categories(samples, args.log_reward_category)
        return metrics

    def _training_data(self, samples: list[Sample]) -> tuple[list[float], TrainBatch]:
        """Raw rewards, and the batch to train on."""
        path = self.args.custom_convert_samples_to_train_data_path
        if path is not None:
            raw_rewards = [sample.get_reward_value(self.args) for sample in samples]
            return raw_rewards, batch_from_dict(load_function(path)(self.args, samples))
        raw_rewards, rewards, are_final = self._rewards(samples)
        return raw_rewards, batch_from_samples(samples, rewards, rewards_are_final=are_final)

    def _rewards(self, samples: list[Sample]) -> tuple[list[float], list[float], bool]:
        """Raw rewards, those to train on, and whether a plug-in has normalised them."""
        path = self.args.custom_reward_post_process_path
        if path is not None:
            raw_rewards, rewards = load_function(path)(self.args, samples)
            return list(map(float, raw_rewards)), list(map(float, rewards)), True
        rewards = [sample.get_reward_value(self.args) for sample in samples]
        return rewards, rewards, False

    def _write_samples(self, rollout_id: int, samples: list[Sample], rewards: list[float]) -> None:
        write_samples(self.run_dir, rollout_id, samples, rewards=rewards, token_texts=self._token_texts)

    def _token_texts(self, token_ids: list[int]) -> list[str]:
        return [str(self.tokenizer.decode([token_id])) for token_id in token_ids]

    def eval(self, rollout_id: int) -> dict[str, float]:
        """`eval/*` metrics of every evaluation set."""
        output = call_rollout_fn(self.eval_function, self.args, rollout_id, self.data_source, evaluation=True)
        assert isinstance(output, RolloutFnEvalOutput)
        extra = output.metrics or {}
        if logs_eval_itself(self.args, rollout_id, output.data, extra):
            return {}
        return eval_metrics(output.data, samples_per_prompt(self.args, output.data)) | extra

    def save(self, rollout_id: int) -> None:
        """Write the state of the data source."""
        self.data_source.save(rollout_id)

    def load(self, rollout_id: int) -> None:
        """Continue the data source after `rollout_id`."""
        self.data_source.load(rollout_id)

    @ray.method(concurrency_group=CONTROL)
    def stacks(self) -> str:
        """What every thread is doing."""
        return thread_stacks()

    @ray.method(concurrency_group=LIFETIME)
    def live(self) -> None:
        """Does not return: the call fails when this process dies, or what samples between two rollouts fails."""
        raise_first_failure()
