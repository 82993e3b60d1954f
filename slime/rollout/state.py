"""What the requests of one rollout share, and how those that are no longer wanted are told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from typing import Any

import anyio

from slime.rollout.tokenizer import tokenizer_of
from slime.utils.http_utils import max_connections
from slime.utils.misc import rare_garbage_collection
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

SamplingParams = dict[str, Any]
Tasks = set["asyncio.Task[Any]"]
SPARE_CONNECTIONS = 32  # for the order to end requests, while all others wait for their answers
OBJECTS_PER_REQUEST = 200  # that the garbage collector looks at, of one in flight


class RolloutFailed(RuntimeError):
    """More samples failed than --max-failed-fraction allows, or the filter dropped more groups than allowed."""


class GenerateState:
    """What the requests of one rollout share: tokenizer, sampling parameters, the count of failures and the first.

    pendings: tasks of `generate_and_rm_group` that `abort` shall end, each with its place among the groups. is_aborted:
    it has been called; from then on no request and no reward is started. generating, scoring: tasks that do that.
    """

    def __init__(self, args: Any, rollout_id: int | None = None) -> None:
        self.args = args
        self.rollout_id = rollout_id
        self.tokenizer = tokenizer_of(args)
        self.sampling_params: SamplingParams = {
            "temperature": args.rollout_temperature,
            "top_p": args.rollout_top_p,
            "top_k": args.rollout_top_k,
            "max_new_tokens": args.rollout_max_response_len,
            "stop": args.rollout_stop,
            "stop_token_ids": args.rollout_stop_token_ids,
            "skip_special_tokens": args.rollout_skip_special_tokens,
        }
        self.num_failed = 0
        self.first_failure = ""
        self.pendings: dict[asyncio.Task[list[Sample]], int] = {}
        self.is_aborted = False
        self.generating: Tasks = set()
        self.scoring: Tasks = set()
        self.num_lost_tokens = 0

    @functools.cached_property
    def semaphore(self) -> anyio.Semaphore:
        """The bound on requests in flight: one for all that run in this event loop, evaluation sets included."""
        return _semaphore(max_in_flight(self.args), asyncio.get_running_loop())

    def count_failure(self, sample: Sample) -> None:
        """Count a FAILED sample; the reason of the first is kept."""
        reason = sample.metadata.get("failure", "no reason given")
        self.num_failed += 1
        self.first_failure = self.first_failure or reason
        logger.warning("sample %s failed: %s", sample.index, reason)

    def interruptible(self, stage: Tasks) -> Interruptible:
        """A block that `abort` may end early by cancelling the tasks of `stage`; what follows the block then runs."""
        return Interruptible(self, stage)


class Interruptible:
    """The block of `GenerateState.interruptible`. A class: three of them for every sample, a generator takes longer."""

    __slots__ = ("stage", "state", "task")

    def __init__(self, state: GenerateState, stage: Tasks) -> None:
        self.state = state
        self.stage = stage

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.stage.add(task)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        self.stage.discard(self.task)
        if isinstance(error, asyncio.CancelledError) and self.state.is_aborted:
            self.task.uncancel()
            return True
        return False


def max_in_flight(args: Any) -> int:
    """Requests at once: --sglang-server-concurrency for each engine, less where this process may open fewer sockets."""
    return _within_open_files(args.sglang_server_concurrency * max(1, args.num_engines))


@functools.lru_cache(maxsize=8)
def _within_open_files(wanted: int) -> int:
    allowed = max_connections() - SPARE_CONNECTIONS
    if wanted > allowed:
        logger.warning(
            "%d requests at once, not %d, as --sglang-server-concurrency would have it: this process may hold no more "
            "connections. Raise the hard limit on open files (ulimit -Hn).",
            allowed,
            wanted,
        )
    return min(wanted, allowed)


def rare_collection(args: Any) -> contextlib.AbstractContextManager[None]:
    """`rare_garbage_collection` for as many objects as the requests in flight are made of."""
    return rare_garbage_collection(min(2_000_000, max(200_000, OBJECTS_PER_REQUEST * max_in_flight(args))))


@functools.lru_cache(maxsize=8)
def _semaphore(bound: int, loop: asyncio.AbstractEventLoop) -> anyio.Semaphore:
    return anyio.Semaphore(bound, fast_acquire=True)
