"""A rollout function outside the package: the default one, with every sample written down."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path

from slime.rollout import fully_async_rollout, sglang_rollout


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    if evaluation:
        (Path(args.run_dir) / f"evaluation_{rollout_id:06d}").touch()
    output = sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=evaluation)
    return _recorded(args, rollout_id, output, evaluation)


def fully_async(args, rollout_id, data_source, evaluation=False, *, weight_version=None):
    output = fully_async_rollout.generate_rollout_fully_async(
        args, rollout_id, data_source, evaluation=evaluation, weight_version=weight_version
    )
    return _recorded(args, rollout_id, output, evaluation)


def _recorded(args, rollout_id, output, evaluation):
    if not evaluation:
        samples = [sample.to_dict() for group in output.samples for sample in group]
        path = Path(args.run_dir) / f"record_{rollout_id:06d}.json"
        path.with_suffix(".tmp").write_text(json.dumps(samples))
        path.with_suffix(".tmp").rename(path)
    return output


async def generate(args, sample, sampling_params):
    """The default generation, with a file for each request under way."""
    flag = Path(args.run_dir) / "in_flight" / str(sample.index)
    flag.parent.mkdir(exist_ok=True)
    flag.touch()
    try:
        return await sglang_rollout.generate(args, sample, sampling_params)
    finally:
        flag.unlink()


async def to_the_end(args, sample, sampling_params):
    """As `generate`, every response as long as it may be."""
    return await generate(args, sample, sampling_params | {"ignore_eos": True})


async def long_or_short(args, sample, sampling_params):
    """Every second prompt has responses of 4 tokens, the others of 150."""
    length = 4 if sample.index % 8 < 4 else 150
    return await generate(args, sample, sampling_params | {"max_new_tokens": length, "ignore_eos": True})


def keeps_the_rollout_from_ending(args, samples, **kwargs):
    """A dynamic filter that keeps all; with the second group of the run, after which the rest is aborted, it waits."""
    folder = Path(args.run_dir) / "kept"
    folder.mkdir(exist_ok=True)
    (folder / str(samples[0].group_index)).touch()
    if len(list(folder.iterdir())) == 2:
        (Path(args.run_dir) / "ending").touch()
        _wait_for(Path(args.run_dir) / "may_end")
    return True


def scores_in_a_process(args, sample, **kwargs):
    """A reward; that of sample 5 waits the first time, for its process to be killed."""
    if sample.index == 5:
        (Path(args.run_dir) / f"scoring_{os.getpid()}").touch()
        threading.Event().wait()
    return float(sample.index % 2)


def _wait_for(path, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} is not there after {timeout_s:g} s")
        time.sleep(0.01)


async def no_threes(args, sample, **kwargs):
    """A reward that a model can learn in a few steps: fewer repetitions of one token."""
    response = sample.tokens[-sample.response_length :]
    return len(set(response)) / max(1, len(response))


async def breaks_while_rollout_0_is_trained_on(args, sample, sampling_params):
    """The default generation; sample 8, of rollout 1, waits for the training step of rollout 0 and raises in it."""
    if sample.index == 8:
        while not (Path(args.run_dir) / "training_0").exists():
            await asyncio.sleep(0.01)
        raise KeyError("sample 8 is lost")
    return await sglang_rollout.generate(args, sample, sampling_params)


def trains_for_ever(args, rollout_id, rollout_data):
    """A training step that does not end."""
    (Path(args.run_dir) / f"training_{rollout_id}").touch()
    threading.Event().wait()


async def without_log_probs(args, sample, sampling_params):
    """The default generation, its log-probs lost: with --use-rollout-logprobs the loss is not finite."""
    await sglang_rollout.generate(args, sample, sampling_params)
    sample.rollout_log_probs = [float("nan")] * sample.response_length
    return sample


def infinite_rewards(args, samples):
    """A reward post-processing that divides by a deviation of 0."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    return rewards, [float("inf")] * len(samples)


async def raises(args, sample, **kwargs):
    raise KeyError("no such answer")


async def returns_nan(args, sample, **kwargs):
    return float("nan")


def hangs(args, sample, **kwargs):
    threading.Event().wait()


not_callable = 3
