"""Waits on real actors that answer, fail, die and hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import ray

from slime.ray.actors import CONTROL, LIFETIME, create_actor
from slime.ray.watchdog import ActorDied, DeadlineExpired, Watchdog, thread_stacks, wait_for_the_end

pytestmark = pytest.mark.usefixtures("local_ray")


class Worker:
    """An actor with every kind of end."""

    def answer(self, value: int) -> int:
        return value

    def refuse(self) -> None:
        raise ValueError("the line is bad")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang_in_this_function(self) -> None:
        threading.Event().wait()

    def break_when_the_peer_dies(self) -> None:
        raise ConnectionError("the peer is gone")

    def pid(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group=CONTROL)
    def stacks(self) -> str:
        return thread_stacks()

    @ray.method(concurrency_group=LIFETIME)
    def live(self) -> None:
        wait_for_the_end()


@pytest.fixture
def workers() -> Iterator[list[ray.actor.ActorHandle]]:
    """Two actors, ended with the test."""
    actors = [create_actor(Worker) for _ in range(2)]
    ray.get([actor.pid.remote() for actor in actors])
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture
def watchdog(workers: list[ray.actor.ActorHandle]) -> Watchdog:
    """Both under watch, as trainer 0 and trainer 1."""
    watchdog = Watchdog()
    for rank, actor in enumerate(workers):
        watchdog.add(f"trainer {rank}", actor)
    return watchdog


def test_results_come_in_the_order_of_the_calls(workers: list, watchdog: Watchdog) -> None:
    calls = [workers[index % 2].answer.remote(index) for index in range(6)]
    assert watchdog.get(calls, timeout_s=30, what="answers") == list(range(6))


def test_the_error_of_a_call_is_raised_with_the_name_of_its_actor(workers: list, watchdog: Watchdog) -> None:
    with pytest.raises(ValueError, match="the line is bad") as caught:
        watchdog.get([workers[1].refuse.remote()], timeout_s=30, what="the prompts")
    assert caught.value.__notes__ == ["in trainer 1, while the driver waited for the prompts"]


def test_an_expired_deadline_names_the_phase_the_silent_and_where_every_actor_stands(workers: list) -> None:
    watchdog = Watchdog({f"trainer {rank}": actor for rank, actor in enumerate(workers)})
    calls = [workers[0].answer.remote(1), workers[1].hang_in_this_function.remote()]
    start = time.monotonic()
    with pytest.raises(DeadlineExpired) as caught:
        watchdog.get(calls, timeout_s=0.5, what="training on rollout 3")
    message = str(caught.value)
    assert "waited 0.5 s for training on rollout 3; no answer from trainer 1." in message
    stacks = message.partition("Where every actor stands:")[2]
    first, second = stacks.split("--- trainer 1")
    assert "--- trainer 0" in first
    assert "hang_in_this_function" in second
    assert "hang_in_this_function" not in first
    assert time.monotonic() - start < 10


def test_a_dead_actor_is_named_with_its_process(workers: list, watchdog: Watchdog) -> None:
    pid = ray.get(workers[1].pid.remote())
    calls = [workers[0].hang_in_this_function.remote(), workers[1].die.remote()]
    with pytest.raises(ActorDied, match=rf"trainer 1 \(pid {pid}\) died while the driver waited for training"):
        watchdog.get(calls, timeout_s=30, what="training")


def test_a_death_is_noticed_while_something_else_is_waited_for(workers: list, watchdog: Watchdog) -> None:
    os.kill(ray.get(workers[1].pid.remote()), signal.SIGKILL)
    with pytest.raises(ActorDied, match=r"trainer 1 .* died while the driver waited for a rollout"):
        watchdog.get([workers[0].hang_in_this_function.remote()], timeout_s=30, what="a rollout")


def test_a_death_comes_before_the_complaints_of_the_peers(workers: list) -> None:
    watchdog = Watchdog({f"trainer {rank}": actor for rank, actor in enumerate(workers)})
    complaint = workers[0].break_when_the_peer_dies.remote()
    ray.wait([complaint])
    with pytest.raises(ActorDied, match="trainer 1"):
        watchdog.get([complaint, workers[1].die.remote()], timeout_s=30, what="training")


def test_an_interruption_ends_any_wait_once_its_time_has_come(workers: list, watchdog: Watchdog) -> None:
    watchdog.interrupt(KeyError("much later"), after_s=3600)
    assert watchdog.get([workers[0].answer.remote(1)], timeout_s=30, what="an answer") == [1]
    watchdog.interrupt(KeyError("enough"))
    with pytest.raises(KeyError, match="enough"):
        watchdog.get([workers[0].hang_in_this_function.remote()], timeout_s=30, what="more")


def test_a_request_is_served_in_the_middle_of_a_wait_and_the_next_one_too(
    workers: list[ray.actor.ActorHandle], watchdog: Watchdog
) -> None:
    asking, helping = workers
    served: list[int] = []

    def service(value: int) -> ray.ObjectRef:
        served.extend(watchdog.get([helping.answer.remote(value + 1)], timeout_s=20.0, what="help"))
        return asking.answer.remote(7) if len(served) == 1 else asking.hang_in_this_function.remote()

    watchdog.serve(asking.answer.remote(3), service)
    busy = create_actor(Worker)
    with pytest.raises(DeadlineExpired):
        watchdog.get([busy.hang_in_this_function.remote()], timeout_s=8.0, what="nothing")
    ray.kill(busy)
    assert served == [4, 8]


def test_the_failure_of_a_call_that_runs_ahead_ends_a_wait_for_another_at_once(
    workers: list, watchdog: Watchdog
) -> None:
    watchdog.watched(workers[0].refuse.remote())
    start = time.monotonic()
    with pytest.raises(ValueError, match="the line is bad") as caught:
        watchdog.get([workers[1].hang_in_this_function.remote()], timeout_s=30, what="training on rollout 3")
    assert caught.value.__notes__ == ["in trainer 0, while the driver waited for training on rollout 3"]
    assert time.monotonic() - start < 10


def test_a_call_that_runs_ahead_is_no_longer_watched_once_it_has_returned(workers: list, watchdog: Watchdog) -> None:
    ahead = watchdog.watched(workers[0].answer.remote(1))
    ray.wait([ahead])
    assert watchdog.get([workers[1].answer.remote(2)], timeout_s=30, what="an answer") == [2]
    assert watchdog.get([ahead], timeout_s=30, what="what ran ahead") == [1]
    assert len(watchdog.monitors) == 2  # the lives of both
