"""Closed forms: W warm-up steps, D decay steps, from `lr` down to `min_lr`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.backends.shared.lr_schedule import continued, learning_rate, schedule_of, weight_decay
from slime.config import OptimizerConfig
from slime.config.base import ConfigError

LR, MIN_LR, D, W = 1.0, 0.1, 100, 10


def rate(step: int, style: str, total_steps: int = D, **settings: Any) -> float:
    defaults = {"lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": W}
    cfg = OptimizerConfig(lr_decay_style=style, **defaults | settings)
    return learning_rate(step, cfg, total_steps)


STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]


@pytest.mark.parametrize("style", STYLES)
def test_warm_up_is_linear_and_ends_at_the_top(style: str) -> None:
    for step in range(W):
        assert rate(step, style, lr_warmup_init=0.2) == pytest.approx(0.2 + 0.8 * (step + 1) / W)
    assert rate(W, style) == pytest.approx(LR)


def test_warm_up_may_be_a_share_of_the_decay() -> None:
    assert rate(4, "linear", lr_warmup_fraction=0.2, lr_warmup_iters=0, lr_decay_iters=50) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("style", "closed_form"),
    [
        ("constant", lambda step: LR),
        ("linear", lambda step: LR - (LR - MIN_LR) * (step - W) / (D - W)),
        ("cosine", lambda step: MIN_LR + (LR - MIN_LR) * math.cos(math.pi / 2 * (step - W) / (D - W)) ** 2),
        ("inverse-square-root", lambda step: max(MIN_LR, LR * math.sqrt(W / step))),
    ],
)
@given(step=st.integers(W, D - 1))
def test_decay_follows_the_closed_form(style: str, closed_form: Any, step: int) -> None:
    assert rate(step, style) == pytest.approx(closed_form(step))


@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: math.cos(math.pi / 2 * x) ** 2),
        ("exponential", lambda x: 2 * math.exp(-x * math.log(2)) - 1),
        ("minus_sqrt", lambda x: 1 - x**0.5),
    ],
)
def test_wsd_is_stable_and_then_decays_over_its_last_steps(shape: str, factor: Any) -> None:
    settings = {"lr_wsd_decay_iters": 20, "lr_wsd_decay_style": shape}
    assert all(rate(step, "WSD", **settings) == LR for step in range(W, D - 20 + 1))
    for step in range(D - 20, D):
        expected = MIN_LR + (LR - MIN_LR) * factor((step - (D - 20)) / 20)
        assert rate(step, "WSD", **settings) == pytest.approx(expected)


@pytest.mark.parametrize("style", [style for style in STYLES if style != "constant"])
def test_after_the_decay_the_rate_is_the_lowest(style: str) -> None:
    assert rate(D, style) == rate(10 * D, style) == MIN_LR


@pytest.mark.parametrize("style", STYLES)
@given(step=st.integers(0, 3 * D), warmup=st.integers(0, D), decay=st.integers(1, 2 * D))
def test_the_rate_stays_between_its_bounds(style: str, step: int, warmup: int, decay: int) -> None:
    value = rate(step, style, lr_warmup_iters=warmup, lr_decay_iters=decay, lr_warmup_init=MIN_LR)
    assert MIN_LR - 1e-12 <= value <= LR + 1e-12


def test_the_decay_takes_the_whole_run_unless_told_otherwise() -> None:
    assert rate(199, "linear", total_steps=200) > rate(299, "linear", total_steps=200) == MIN_LR
    assert rate(50, "linear", total_steps=200, lr_decay_iters=50) == MIN_LR


# --- a run that continues


def rates(cfg: OptimizerConfig, total_steps: int) -> list[float]:
    return [learning_rate(step, cfg, total_steps) for step in range(total_steps)]


@pytest.mark.parametrize("style", STYLES)
def test_the_schedule_of_a_checkpoint_can_be_kept_whatever_the_settings_say(style: str) -> None:
    old = OptimizerConfig(lr=LR, min_lr=MIN_LR, lr_warmup_iters=3, lr_decay_style=style)
    saved = json.loads(json.dumps(schedule_of(old, 20)))  # as a checkpoint holds it
    new = OptimizerConfig(lr=5.0, lr_warmup_fraction=0.5, lr_decay_style="cosine", use_checkpoint_lr_scheduler=True)
    kept = continued(new, saved, total_steps=40)
    assert rates(kept, 40)[:20] == rates(old, 20)
    assert kept.use_checkpoint_lr_scheduler, "other settings stay"


def test_settings_win_and_a_change_is_named_unless_it_is_meant(caplog: pytest.LogCaptureFixture) -> None:
    saved = schedule_of(OptimizerConfig(lr=LR, lr_decay_style="linear"), 20)
    new = OptimizerConfig(lr=0.5, lr_decay_style="linear")
    assert continued(new, saved, total_steps=40) is new
    assert "lr 0.5 (was 1.0), lr_decay_iters 40 (was 20)" in caplog.text
    caplog.clear()
    continued(replace(new, override_lr_scheduler=True), saved, total_steps=40)
    continued(OptimizerConfig(lr=LR, lr_decay_style="linear"), saved, total_steps=20)
    continued(new, None, total_steps=20)  # a checkpoint from before schedules were written down
    assert caplog.text == ""


def test_a_constant_rate_does_not_care_how_long_the_run_is(caplog: pytest.LogCaptureFixture) -> None:
    cfg = OptimizerConfig(lr=LR)
    continued(cfg, schedule_of(cfg, 20), total_steps=40)
    assert caplog.text == ""


def test_one_schedule_is_chosen() -> None:
    with pytest.raises(ConfigError, match="--override-lr-scheduler must be left out with --use-checkpoint-lr-"):
        OptimizerConfig(use_checkpoint_lr_scheduler=True, override_lr_scheduler=True)


def test_weight_decay_goes_from_start_to_end_or_stays() -> None:
    def decays(style: Any, **settings: Any) -> list[float]:
        cfg = OptimizerConfig(weight_decay_incr_style=style, **settings)
        return [weight_decay(step, cfg, 4) for step in range(6)]

    ends = {"start_weight_decay": 0.1, "end_weight_decay": 0.5}
    assert decays("constant", weight_decay=0.3) == [0.3] * 6
    assert decays("linear", **ends) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    halves = [0.5 * (1 - math.cos(math.pi * quarter / 4)) for quarter in (0, 1, 2, 3, 4, 4)]
    assert decays("cosine", **ends) == pytest.approx([0.1 + 0.4 * half for half in halves])
    with pytest.raises(ConfigError, match="--start-weight-decay must be given with --weight-decay-incr-style linear"):
        OptimizerConfig(weight_decay_incr_style="linear", end_weight_decay=0.5)
    with pytest.raises(
        ConfigError, match="--end-weight-decay must be left out with --weight-decay-incr-style constant"
    ):
        OptimizerConfig(end_weight_decay=0.5)
