"""Tasks of verifiers 0.3 and later, with the package itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from slime.rollout.rm_hub import RewardError, async_rm, batched_async_rm
from slime.utils.async_utils import run
from slime.utils.types import Sample
from tests.rollout.rm_hub.test_custom import RewardArgs

vf = pytest.importorskip("verifiers.v1", reason="verifiers is installed beside slime by those who use it")


class Data(vf.TaskData):
    answer: int
    level: str = "easy"


class Sums(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def right(self, task: Data, trace: Any) -> float:
        assert task.level == "hard" and trace.num_turns == 1 and not trace.has_error
        assert [message.role for message in trace.messages] == ["user", "assistant"]
        return float(trace.last_reply == str(task.answer))

    @vf.reward
    async def short(self, trace: Any) -> float:
        return 1.0 / len(trace.last_reply)

    @vf.metric
    async def length(self, trace: Any) -> float:
        return len(trace.last_reply)


class SumSet(vf.Taskset[Sums]):
    def load(self) -> Iterator[Sums]:
        yield Sums(Data(prompt="1+1=?", answer=2))


class Boxed(vf.Task[Data]):
    @vf.reward
    async def right(self, trace: Any, runtime: Any) -> float:
        return 1.0


class Silent(vf.Task[Data]):
    @vf.metric
    async def length(self, trace: Any) -> float:
        return 0.0


class Broken(vf.Task[Data]):
    @vf.reward
    async def right(self, trace: Any) -> float:
        raise KeyError("oops")


def load_taskset() -> SumSet:
    from verifiers.v1.configs.taskset import TasksetConfig

    return SumSet(TasksetConfig())


def settings(name: str, **fields: Any) -> RewardArgs:
    return RewardArgs(f"{__name__}.{name}", "verifiers", rm_num_workers=0, **fields)


def sample(response: str, **fields: Any) -> Sample:
    values: dict[str, Any] = {"prompt": "30+4=?", "label": "34", "metadata": {"level": "hard", "other": 1}} | fields
    return Sample(index=7, response=response, **values)


@pytest.mark.parametrize("name", ["Sums", "SumSet", "load_taskset"])
@pytest.mark.parametrize("as_chat", [False, True])
def test_the_rewards_of_a_task_are_added_by_their_weights_and_kept(name: str, as_chat: bool) -> None:
    scored = sample("34")
    assert run(async_rm(settings(name, apply_chat_template=as_chat), scored)) == 2.5
    assert scored.metadata["rubric"] == {"right": 1.0, "short": 0.5, "length": 2.0}


def test_samples_of_a_group_are_scored_each_by_itself() -> None:
    args = settings("Sums", group_rm=True)
    assert run(batched_async_rm(args, [sample("34"), sample("3333")])) == [2.5, 0.25]


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("Sums", {"label": "many"}, "the sample is no Data: answer: Input should be a valid integer"),
        ("Boxed", {}, "Boxed.right needs a runtime of verifiers"),
        ("Silent", {}, "Silent has no reward"),
        ("Broken", {}, "oops"),
    ],
)
def test_what_cannot_be_scored_fails_the_sample_with_the_reason(name: str, fields: Any, reason: str) -> None:
    with pytest.raises(RewardError, match=reason):
        run(async_rm(settings(name), sample("34", **fields)))
