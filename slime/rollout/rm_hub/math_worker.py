r"""The process that compares mathematical answers: one JSON line in, one out, until stdin closes.

    {"answer": "\\frac{1}{2}", "label": "0.5", "timeout_s": 10}   ->   {"correct": true}

A comparison may take for ever, in C code that no Python signal handler interrupts (`9**9**9**9`). Each therefore runs
under an alarm whose default action ends this process; the parent starts another. Memory is limited for the same reason.
Run as a file: it imports nothing of slime.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

_MEMORY_BYTES = 4 << 30


def main() -> None:
    """Answer requests, one a line, until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its end closes stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.WARNING)
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
        gold = parse(request["label"], parsing_timeout=None)
        answer = parse(request["answer"], parsing_timeout=None)
        is_correct = verify(gold, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"correct": bool(is_correct)}), flush=True)


if __name__ == "__main__":
    main()
