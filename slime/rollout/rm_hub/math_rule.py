r"""--rm-type math: 1 if the response's answer equals the label mathematically (math-verify), else 0.

The answer is the last \boxed{...}, or without one what math-verify takes for the final expression. Answers that are
the same text, and two plain numbers, are compared on the spot; all others by processes of their own (`math_worker`).
An answer that cannot be compared within its time counts as wrong: a model can write 9^{9^{9^9}}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import selectors
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from slime.rollout.rm_hub.answers import extract_boxed
from slime.rollout.rm_hub.errors import required_label
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

MAX_COMPARISON_S = 10.0
_START_S = 120.0  # deadline for the imports of a worker: 2 s on an idle machine
_MAX_WORKERS = 16
_TAIL_CHARS = 4096  # of a response without \boxed{}: its end holds the answer

_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


async def math_reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0. Raises ValueError for a sample without a label."""
    label = required_label("math", sample)
    label = extract_boxed(label) or label.strip().strip("$").strip()
    answer = extract_boxed(sample.response)
    known = _compare_plain(answer, label) if answer else None
    if known is not None:
        return float(known)
    text = rf"\boxed{{{answer}}}" if answer else sample.response[-_TAIL_CHARS:]
    timeout_s = min(args.rm_timeout_s, MAX_COMPARISON_S)
    loop = asyncio.get_running_loop()
    return float(await loop.run_in_executor(_threads(), _compare, text, rf"\boxed{{{label}}}", timeout_s))


def _compare_plain(answer: str, label: str) -> bool | None:
    """Whether the two are equal, where that needs no algebra; None where it may."""
    if answer == label:
        return True
    if _PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(label):
        if Decimal(answer) == Decimal(label):
            return True
        return None if "." in answer + label else False  # decimals may be equal but for rounding
    return None


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """One thread for each worker process, which it owns."""
    num_workers = max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // 2))
    return ThreadPoolExecutor(num_workers, thread_name_prefix="math-verify")


_own = threading.local()


@lru_cache(maxsize=16384)  # the samples of a group mostly have few different answers
def _compare(answer: str, label: str, timeout_s: float) -> bool:
    worker: MathWorker | None = getattr(_own, "worker", None)
    if worker is None or not worker.is_alive():
        worker = _own.worker = MathWorker()
    try:
        return worker.compare(answer, label, timeout_s)
    except TimeoutError:
        logger.warning("answer counted as wrong, cannot be compared in %.0f s: %.80r", timeout_s, answer)
        return False


class MathWorker:
    """A `math_worker` process. It ends when this object's process does, by the end of its stdin."""

    def __init__(self) -> None:
        program = Path(__file__).with_name("math_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self._read_line(_START_S)
        except TimeoutError as error:
            self.close()
            raise RuntimeError(f"the math-verify process ended at its start, or took over {_START_S:.0f} s") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def compare(self, answer: str, label: str, timeout_s: float) -> bool:
        """Whether the two texts hold equal expressions. Raises TimeoutError, the process gone, if it takes too long."""
        request = json.dumps({"answer": answer, "label": label, "timeout_s": timeout_s})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            return bool(self._read_line(timeout_s + MAX_COMPARISON_S)["correct"])
        except (TimeoutError, BrokenPipeError) as error:
            self.close()
            raise TimeoutError("the math-verify process ended") from error

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _read_line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:  # select.select takes no file above number 1,023
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(timeout_s) else b""
        if not line:
            raise TimeoutError("no answer from the math-verify process")
        message: dict[str, Any] = json.loads(line)
        return message
