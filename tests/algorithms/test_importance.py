from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slime.algorithms.importance import Correction, MISOptions, icepop, mis, mismatch_metrics, tis
from slime.algorithms.sequences import Sequences

LOG_RATIOS = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8)
# (old minus rollout log-prob, trained) of each token of each sequence
BATCHES = st.lists(
    st.lists(st.tuples(st.floats(-1.5, 1.5, width=32), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=5
)
LEVELS, MODES = ("token", "sequence", "geometric"), ("truncate", "clip", "mask")
OPTIONS = [
    *(MISOptions(level=level, mode=mode, low=0.6, high=1.7) for level, mode in product(LEVELS, MODES)),  # type: ignore[arg-type]
    *(MISOptions(rs_level=level, rs_low=0.7, rs_high=1.4) for level in LEVELS),  # type: ignore[arg-type]
    MISOptions(veto=0.5),
    MISOptions("geometric", "mask", 0.6, 1.7, rs_level="token", rs_low=0.4, rs_high=3.0, veto=0.3),
]


def log_probs(log_ratios: list[float]) -> tuple[Tensor, Tensor]:
    rollout_T = torch.linspace(-3, -0.5, len(log_ratios), dtype=torch.float64)
    return rollout_T + torch.tensor(log_ratios, dtype=torch.float64), rollout_T


def corrected(batch: list[list[tuple[float, bool]]], options: MISOptions, *, garbage: float = math.nan) -> Correction:
    tokens = [(gap if trained else garbage, trained) for sequence in batch for gap, trained in sequence]
    old_T, rollout_T = log_probs([gap for gap, _ in tokens])
    mask_T = torch.tensor([float(trained) for _, trained in tokens], dtype=torch.float64)
    ids_T = torch.tensor([index for index, sequence in enumerate(batch) for _ in sequence])

    def sequence_sum(x_T: Tensor) -> Tensor:
        return torch.zeros(len(batch), dtype=x_T.dtype).index_add(0, ids_T, x_T)

    return mis(old_T, rollout_T, sequences=Sequences(mask_T, ids_T, sequence_sum), options=options)


def oracle(sequence: list[tuple[float, bool]], options: MISOptions) -> list[float]:
    """The weight of each token of a sequence."""
    trained = [gap for gap, is_trained in sequence if is_trained]
    is_vetoed = options.veto is not None and any(math.exp(gap) < options.veto for gap in trained)

    def ratio(gap: float, level: str) -> float:
        return math.exp({"token": gap, "sequence": sum(trained), "geometric": sum(trained) / len(trained)}[level])

    weights = []
    for gap, is_trained in sequence:
        weight = 0.0
        if is_trained and not is_vetoed:
            weight = ratio(gap, options.level)
            if options.mode == "mask":
                weight = weight if options.low <= weight <= options.high else 0.0
            else:
                weight = min(max(weight, options.low if options.mode == "clip" else 0.0), options.high)
            if options.rs_level and not options.rs_low <= ratio(gap, options.rs_level) <= options.rs_high:
                weight = 0.0
        weights.append(weight)
    return weights


@given(log_ratios=LOG_RATIOS, low=st.sampled_from([0.0, 0.5]))
def test_tis_clamps_and_icepop_drops(log_ratios: list[float], low: float) -> None:
    ratios = [math.exp(x) for x in log_ratios]
    truncated, popped = (f(*log_probs(log_ratios), low=low, high=2.0) for f in (tis, icepop))
    assert truncated.weights_T.tolist() == pytest.approx([min(max(r, low), 2.0) for r in ratios])
    assert popped.weights_T.tolist() == pytest.approx([r if low <= r <= 2.0 else 0.0 for r in ratios])
    assert truncated.keep_T.tolist() == [1.0] * len(ratios)
    assert popped.keep_T.tolist() == [float(low <= r <= 2.0) for r in ratios]
    for result in (truncated, popped):
        assert result.metrics["tis"].tolist() == pytest.approx(ratios)
        assert result.metrics["tis_abs"].tolist() == pytest.approx([abs(r - 1) for r in ratios])
        assert result.metrics["tis_clipfrac"].tolist() == [float(not low <= r <= 2.0) for r in ratios]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(batch=BATCHES)
def test_mis_weights_equal_a_loop_over_sequences(options: MISOptions, batch: list[list[tuple[float, bool]]]) -> None:
    result = corrected(batch, options)
    expected = [weight for sequence in batch for weight in oracle(sequence, options)]
    assert result.weights_T.tolist() == pytest.approx(expected, abs=1e-9)
    assert result.keep_T.tolist() == [float(weight != 0) for weight in expected]
    assert all(metric.isfinite().all() for metric in result.metrics.values())


def test_a_token_level_truncation_is_tis() -> None:
    log_ratios = [0.1, -2.0, 1.5]
    expected = tis(*log_probs(log_ratios), low=0.0, high=2.0)
    result = corrected([[(gap, True) for gap in log_ratios]], MISOptions())
    torch.testing.assert_close(result.weights_T, expected.weights_T)


def test_the_share_of_rejected_and_vetoed_tokens_is_measured_over_the_original_tokens() -> None:
    batch = [[(0.0, True), (1.0, True)], [(-8.0, True), (0.0, True)]]
    result = corrected(batch, MISOptions(rs_level="token", veto=1e-3))
    assert result.metrics["mis_rs_fraction"].tolist() == [0, 1, 1, 0]
    assert result.metrics["mis_veto_fraction"].tolist() == [0, 0, 1, 1]
    assert result.weights_T.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("log_ratio", [-1e6, 1e6])
def test_ratios_beyond_floating_point_give_finite_weights_and_metrics(log_ratio: float) -> None:
    old_T, rollout_T = torch.tensor([log_ratio - 1.0]), torch.tensor([-1.0])
    for result in (tis(old_T, rollout_T, low=0, high=2), icepop(old_T, rollout_T, low=0.5, high=2)):
        assert result.weights_T.isfinite().all()
        assert all(metric.isfinite().all() for metric in result.metrics.values())
    assert all(metric.isfinite().all() for metric in mismatch_metrics(old_T, rollout_T).values())
    for level in LEVELS:
        options = MISOptions(level=level)  # type: ignore[arg-type]
        assert corrected([[(log_ratio, True)] * 3], options).weights_T.isfinite().all()


def test_weights_carry_no_gradient() -> None:
    old_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    rollout_T = torch.tensor([-1.5, -1.0])
    sequences = Sequences(torch.ones(2), torch.zeros(2, dtype=torch.int64), lambda x_T: x_T.sum()[None])
    results = [
        tis(old_T, rollout_T, low=0, high=2),
        icepop(old_T, rollout_T, low=0.5, high=2),
        *(mis(old_T, rollout_T, sequences=sequences, options=options) for options in OPTIONS),
    ]
    assert not any(result.weights_T.requires_grad or result.keep_T.requires_grad for result in results)
    assert not any(metric.requires_grad for result in results for metric in result.metrics.values())
    assert not any(metric.requires_grad for metric in mismatch_metrics(old_T, rollout_T).values())


def test_mismatch_metrics_estimate_the_divergences_of_engine_from_trainer() -> None:
    engine = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    trainer = torch.tensor([0.15, 0.2, 0.35, 0.3], dtype=torch.float64)
    expected_kl = (engine * (engine / trainer).log()).sum()
    means = {name: (engine * x).sum() for name, x in mismatch_metrics(trainer.log(), engine.log()).items()}
    torch.testing.assert_close(means["mismatch_kl"], expected_kl)
    torch.testing.assert_close(means["mismatch_k3_kl"], expected_kl)
    torch.testing.assert_close(means["mismatch_ratio"], torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(means["mismatch_chi2"], ((trainer - engine) ** 2 / engine).sum())
    torch.testing.assert_close(means["mismatch_abs_diff"], (engine * (engine / trainer).log().abs()).sum())


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"low": 3.0}, "low and high"), ({"rs_low": -1.0}, "rs_low and rs_high"), ({"veto": 0.0}, "veto")],
)
def test_options_that_are_no_intervals_of_ratios_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MISOptions(**fields)  # type: ignore[arg-type]
