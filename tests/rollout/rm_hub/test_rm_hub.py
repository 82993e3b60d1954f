import asyncio
import math
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from aiohttp import web

from slime.rollout.rm_hub import RULES, RewardError, async_rm, batched_async_rm, check_rm_type
from slime.utils import http_utils
from slime.utils.types import Sample

HERE = __name__


@dataclass(frozen=True)
class RewardArgs:
    rm_type: str | None = None
    rm_url: str | None = None
    custom_rm_path: str | None = None
    group_rm: bool = False
    rm_timeout_s: float = 30.0
    rm_num_workers: int | None = 0
    custom_rm_style: str = "slime"
    rollout_seed: int = 0


def reward(args, sample, **kwargs):
    return asyncio.run(async_rm(args, sample, **kwargs))


def custom(name, **fields):
    return RewardArgs(custom_rm_path=f"{HERE}.{name}", **fields)


async def async_one(args, sample, **kwargs):
    return 1


def sync_two(args, sample, **kwargs):
    return 2


def sync_that_returns_a_coroutine(args, sample):
    return async_one(args, sample)


class CallableReward:
    async def __call__(self, args, sample):
        return 3


callable_reward = CallableReward()


async def echo_kwargs(args, sample, *, evaluation=False):
    return float(evaluation)


def raises(args, sample):
    raise KeyError("no such tool")


async def raises_timeout(args, sample):
    raise TimeoutError("inner")


released = threading.Event()


def hangs(args, sample):
    released.wait(60)
    return 1.0


async def hangs_async(args, sample):
    await asyncio.sleep(60)


def returns_label(args, sample):
    return RETURNED[sample.label]


RETURNED = {
    "nan": math.nan, "inf": {"score": -math.inf}, "none": None, "text": "1", "list": [1.0], "empty": {},
    "array": np.zeros(2), "tensor": torch.zeros(2),
}  # fmt: skip


def scores_group(args, samples, **kwargs):
    return [float(sample.index) for sample in samples]


async def scores_group_short(args, samples):
    return [1.0]


def test_the_order_of_precedence_is_sample_path_then_flag_path_then_metadata_then_flag():
    flags = custom("async_one", rm_type="exact_match")
    sample = Sample(response="x", label="x", metadata={"rm_type": "dapo"})
    assert reward(flags, Sample(custom_rm_path=f"{HERE}.sync_two")) == 2.0
    assert reward(flags, sample) == 1.0
    assert reward(RewardArgs(rm_type="exact_match"), sample) == {"score": -1.0, "acc": False, "pred": ""}
    assert reward(RewardArgs(rm_type="exact_match"), Sample(response=" x\n", label="x")) == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("async_one", 1.0), ("sync_two", 2.0), ("sync_that_returns_a_coroutine", 1.0), ("callable_reward", 3.0)],
)
def test_a_custom_function_may_be_async_or_not(name, value):
    assert reward(custom(name), Sample()) == value


def test_keywords_reach_a_custom_function():
    assert reward(custom("echo_kwargs"), Sample(), evaluation=True) == 1.0


@pytest.mark.parametrize("value", [True, np.float32(1), np.int64(1), np.array(1.0), torch.tensor(1.0)])
def test_any_scalar_is_a_reward(monkeypatch, value):
    monkeypatch.setitem(RETURNED, "scalar", value)
    result = reward(custom("returns_label"), Sample(label="scalar"))
    assert result == 1.0 and type(result) is float


@pytest.mark.parametrize(
    ("label", "reason"),
    [("nan", "returned nan"), ("inf", r"\['score'\], sample 7: returned -inf"), ("none", "returned None, not a number"),
     ("text", "returned '1', not a number"), ("list", r"returned \[1.0\], not a number"),
     ("empty", "returned an empty dict"), ("array", "not one number"), ("tensor", "not one number")],
)  # fmt: skip
def test_what_is_not_a_finite_number_is_an_error_naming_function_and_sample(label, reason):
    with pytest.raises(RewardError, match=rf"returns_label.*sample 7.*{reason}|returns_label{reason}"):
        reward(custom("returns_label"), Sample(label=label, index=7))


def test_a_function_that_raises_is_named_with_sample_and_reason():
    with pytest.raises(RewardError, match="reward .*raises, sample 7: raised KeyError: 'no such tool'") as caught:
        reward(custom("raises"), Sample(index=7))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="raised TimeoutError"):
        reward(custom("raises_timeout"), Sample())


@pytest.mark.parametrize("name", ["hangs", "hangs_async"])
def test_a_function_that_hangs_ends_at_its_deadline(name):
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"no reward within 0.2 s \(--rm-timeout-s\)"):
        reward(custom(name, rm_timeout_s=0.2), Sample())
    assert time.monotonic() - started < 10
    released.set()


def test_a_function_that_hangs_does_not_hold_up_the_end_of_the_process():
    program = (
        "import asyncio, threading; from slime.rollout.rm_hub.deadline import call_with_deadline; "
        "asyncio.run(call_with_deadline(threading.Event().wait, name='f', sample_index=0, timeout_s=0.1))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "reward f, sample 0: no reward within 0.1 s" in result.stderr


def test_a_blocking_function_leaves_the_event_loop_free():
    arrived = threading.Barrier(3)

    async def main():
        args = custom("waits_for_others")
        tasks = [asyncio.ensure_future(async_rm(args, Sample(metadata={"barrier": arrived}))) for _ in range(2)]
        while arrived.n_waiting < 2:
            await asyncio.sleep(0.001)
        arrived.wait(10)  # the two calls block at the same time, and this loop runs
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [1.0, 1.0]


def waits_for_others(args, sample):
    sample.metadata["barrier"].wait(30)
    return 1.0


def test_hanging_threads_do_not_use_up_the_threads_for_rewards():
    stop = threading.Event()

    async def main():
        hanging = [Sample(metadata={"event": stop}) for _ in range(80)]  # more than run at a time
        failed = await asyncio.gather(
            *(async_rm(custom("waits_for_event", rm_timeout_s=0.1), sample) for sample in hanging),
            return_exceptions=True,
        )
        return failed, await async_rm(custom("sync_two"), Sample())

    failed, value = asyncio.run(main())
    stop.set()
    assert all(isinstance(error, RewardError) for error in failed) and value == 2.0


def waits_for_event(args, sample):
    sample.metadata["event"].wait(60)
    return 1.0


def test_an_unknown_rule_is_a_mistake_of_the_settings_and_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"--rm-type must be {', '.join(RULES)}.*got 'maths'") as caught:
        reward(RewardArgs(rm_type="maths"), Sample())
    assert not isinstance(caught.value, RewardError)
    assert check_rm_type("boxed_dapo") == "dapo"


def test_no_rule_at_all_and_a_path_that_does_not_import_are_mistakes_of_the_settings():
    for args, reason in [
        (RewardArgs(), "--rm-type or --custom-rm-path"),
        (RewardArgs(custom_rm_path="no.such"), "no.such"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            reward(args, Sample())
        assert not isinstance(caught.value, RewardError)


def test_the_prefix_boxed_scores_what_stands_in_the_last_box_and_leaves_the_sample_alone():
    sample = Sample(response=r"so \boxed{34} I think", label="34")
    assert reward(RewardArgs(rm_type="boxed_exact_match"), sample) == 1.0
    assert sample.response == r"so \boxed{34} I think"
    assert reward(RewardArgs(rm_type="boxed_exact_match"), Sample(response="34", label="34")) == 0.0


def test_a_rule_that_needs_a_label_says_how_to_name_it():
    with pytest.raises(RewardError, match="exact_match, sample 7: .*--label-key"):
        reward(RewardArgs(rm_type="exact_match"), Sample(index=7))


def test_random_rewards_are_a_fair_coin_that_repeats_with_the_seed():
    draws = [reward(RewardArgs(rm_type="random"), Sample(index=index)) for index in range(400)]
    assert draws == [reward(RewardArgs(rm_type="random"), Sample(index=index)) for index in range(400)]
    assert set(draws) == {0.0, 1.0} and 150 < sum(draws) < 250
    assert draws != [reward(RewardArgs(rm_type="random", rollout_seed=1), Sample(index=index)) for index in range(400)]


def test_several_samples_are_scored_in_order():
    args = RewardArgs(rm_type="exact_match")
    samples = [Sample(response="a", label="a"), Sample(response="b", label="a")]
    assert asyncio.run(batched_async_rm(args, samples)) == [1.0, 0.0]
    with pytest.raises(RewardError, match="sample 1"):
        asyncio.run(batched_async_rm(args, [samples[0], Sample(index=1)]))


def test_a_group_function_gets_all_samples_at_once():
    samples = [Sample(index=3), Sample(index=4)]
    assert asyncio.run(batched_async_rm(custom("scores_group", group_rm=True), samples)) == [3.0, 4.0]
    assert asyncio.run(batched_async_rm(custom("scores_group", group_rm=True), [])) == []
    with pytest.raises(RewardError, match="must return a list of 2 rewards, got .1.0"):
        asyncio.run(batched_async_rm(custom("scores_group_short", group_rm=True), samples))


async def ask_server(handler, **fields):
    application = web.Application()
    application.router.add_post("/rm", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        args = RewardArgs(rm_type="remote_rm", rm_url=f"http://127.0.0.1:{port}/rm", **fields)
        return await async_rm(args, Sample(prompt="p", response="r", label="l", index=7))
    finally:
        await http_utils.close()
        await runner.cleanup()


def test_a_remote_reward_server_gets_prompt_response_and_label():
    async def handler(request):
        return web.json_response({"score": 0.5, "seen": await request.json()})

    assert asyncio.run(ask_server(handler)) == {"score": 0.5, "seen": {"prompt": "p", "response": "r", "label": "l"}}


def test_a_remote_reward_server_that_fails_fails_the_sample():
    async def handler(request):
        return web.Response(status=400, text="no model loaded")

    with pytest.raises(RewardError, match="remote_rm, sample 7: raised HTTPError: .*no model loaded"):
        asyncio.run(ask_server(handler))


def test_a_remote_reward_without_an_address_is_a_mistake_of_the_settings():
    with pytest.raises(ValueError, match="--rm-url"):
        reward(RewardArgs(rm_type="remote_rm"), Sample())


def test_a_reward_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RewardError("f", 7, "why")))
    assert (str(error), error.sample_index) == ("reward f, sample 7: why", 7)
