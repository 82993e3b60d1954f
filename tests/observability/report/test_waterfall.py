import pytest

from slime.observability.report.waterfall import own_seconds, spans_of
from slime.observability.timer import PhaseRecord


def record(phase: str, start: float, end: float, rollout_id: int = 0) -> PhaseRecord:
    return PhaseRecord(rollout_id, phase, start, end, "driver", 0.0)


def test_nesting_is_reckoned_from_the_stamps():
    records = [
        record("log_probs", 3.0, 4.0),
        record("rollout", 0.0, 2.0),
        record("train", 2.5, 6.0),
        record("step", 0.0, 7.0),
        record("eval", 7.0, 8.0),
    ]
    spans = {span.record.phase: (span.depth, span.own_s) for span in spans_of(records)}
    assert spans == {
        "step": (0, pytest.approx(1.5)),
        "rollout": (1, 2.0),
        "train": (1, 2.5),
        "log_probs": (2, 1.0),
        "eval": (0, 1.0),
    }


def test_each_second_counts_once():
    records = [
        record("step", 0.0, 10.0),
        record("train", 1.0, 9.0),
        record("micro", 2.0, 3.0),
        record("micro", 4.0, 5.0),
        record("step", 10.0, 14.0, rollout_id=1),
    ]
    seconds = own_seconds(spans_of(records))
    assert seconds == {0: {"step": 2.0, "train": 6.0, "micro": 2.0}, 1: {"step": 4.0}}
