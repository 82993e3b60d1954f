"""Which metrics the report draws, and what each is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from slime.observability.report.run import Run, finite, short, smoothing_window, trailing_mean
from slime.observability.report.svg import Line, line_chart
from slime.observability.tracking import Series

_X_LABELS = {"rollout/step": "rollout", "train/step": "step", "eval/step": "rollout"}


@dataclass(frozen=True)
class ChartSpec:
    """One small chart: `keys` are `(metric, label)`; drawn where at least one of them was recorded."""

    title: str
    axis: str
    keys: tuple[tuple[str, str], ...]
    note: str
    unit_interval: bool = False
    band: tuple[str, str] | None = None  # metrics of the first line's lowest and highest values


SMALL_CHARTS = (
    ChartSpec(
        "Response length",
        "rollout/step",
        (("rollout/response_len/mean", "mean"),),
        "Tokens the policy sampled; the area runs from the shortest to the longest.",
        band=("rollout/response_len/min", "rollout/response_len/max"),
    ),
    ChartSpec(
        "Truncated, looping, failed",
        "rollout/step",
        (
            ("rollout/truncated_ratio", "truncated"),
            ("rollout/repetition_frac", "looping"),
            ("rollout/failed", "failed"),
        ),
        "Shares of the samples. A rise here often comes before the reward falls.",
    ),
    ChartSpec(
        "Groups without a signal",
        "rollout/step",
        (("rollout/zero_std/ratio", "share of groups"),),
        "Groups whose samples all got one reward: their advantages are zero.",
        unit_interval=True,
    ),
    ChartSpec(
        "Entropy",
        "train/step",
        (("train/entropy_loss", "entropy"),),
        "Nats per token. A fall towards zero means that exploration has ended.",
    ),
    ChartSpec(
        "KL to the reference",
        "train/step",
        (("train/kl_loss", "KL"),),
        "How far the policy has moved from where it began, in nats per token.",
    ),
    ChartSpec(
        "KL to the old policy",
        "train/step",
        (("train/ppo_kl", "KL"),),
        "How far one rollout's optimizer steps moved it; zero for the first step of a rollout.",
    ),
    ChartSpec(
        "Clip fraction",
        "train/step",
        (("train/pg_clipfrac", "clipped tokens"),),
        "Share of the tokens whose ratio left the clip range.",
    ),
    ChartSpec("Gradient norm", "train/step", (("train/grad_norm", "norm"),), "Before clipping."),
    ChartSpec("Loss", "train/step", (("train/loss", "loss"),), "What is minimised; in RL its level says little."),
    ChartSpec(
        "Train/rollout log-prob gap",
        "train/step",
        (("train/train_rollout_logprob_abs_diff", "mean |difference|"),),
        "Trainer against engine on the same tokens. Beyond rounding, something is out of step.",
    ),
    ChartSpec(
        "Staleness",
        "rollout/step",
        (("rollout/staleness/mean", "mean"), ("rollout/staleness/max", "max")),
        "Weight versions between the newest policy and the one that sampled.",
    ),
    ChartSpec(
        "Sampling throughput",
        "rollout/step",
        (("perf/tokens_per_sec", "tokens/s"),),
        "Sampled tokens per second of a whole rollout.",
    ),
)


def learning_lines(run: Run) -> list[Line]:
    """Reward of the rollouts, smoothed over the raw values, and one line per evaluation."""
    lines: list[Line] = []
    reward = run.reward
    window = smoothing_window(len(reward.steps))
    if finite(reward.values):
        if window > 1:
            lines.append(Line("reward", reward.steps, reward.values, 0, "faint"))
        label = f"training reward (mean of {window})" if window > 1 else "training reward"
        lines.append(Line(label, reward.steps, trailing_mean(reward.values, window), 0))
    for color, (name, series) in enumerate(run.evals.items(), start=1):
        if finite(series.values):
            lines.append(Line(f"held-out {name}", series.steps, series.values, 1 + (color - 1) % 7, "dots"))
    return lines


def learning_chart(run: Run) -> str:
    """The large chart at the top of the page."""
    lines = learning_lines(run)
    if not lines:
        return '<p class="missing">No reward and no evaluation has been recorded yet.</p>'
    svg = line_chart(lines, width=1080, height=340, x_label="rollout", unit_interval=True)
    return f'<figure class="card">{legend(lines)}{svg}</figure>'


def small_charts(run: Run) -> str:
    """The small charts of all metrics that were recorded, and the names of those that were not."""
    cards, missing = [], []
    for spec in SMALL_CHARTS:
        lines = _lines(run, spec)
        if lines:
            cards.append(_card(spec, lines))
        else:
            missing.append(spec.title)
    absent = (
        f'<p class="missing">Not recorded in this run: {escape(", ".join(missing).lower())}.</p>' if missing else ""
    )
    return f'<div class="grid3">{"".join(cards)}</div>{absent}'


def legend(lines: Sequence[Line]) -> str:
    """A swatch, the label and the last value of each line."""
    entries = []
    for line in lines:
        if line.style != "faint":
            last = finite(line.ys)[-1:]
            value = f" <b>{short(last[0])}</b>" if last else ""
            entries.append(f'<span><i class="swatch c{line.color}"></i>{escape(line.label)}{value}</span>')
    return f'<figcaption class="legend">{"".join(entries)}</figcaption>'


def _lines(run: Run, spec: ChartSpec) -> list[Line]:
    found = [(label, run.series(spec.axis, key)) for key, label in spec.keys]
    lines = [
        Line(label, series.steps, series.values, color)
        for color, (label, series) in enumerate(found)
        if finite(series.values)
    ]
    if spec.band is not None and lines:
        low, high = (run.series(spec.axis, key) for key in spec.band)
        if low.steps == high.steps == lines[0].xs and _is_finite(low) and _is_finite(high):
            first = lines[0]
            lines[0] = Line(first.label, first.xs, first.ys, first.color, band=(low.values, high.values))
    return lines


def _is_finite(series: Series) -> bool:
    return len(finite(series.values)) == len(series.values)


def _card(spec: ChartSpec, lines: Sequence[Line]) -> str:
    x_label = _X_LABELS[spec.axis]
    svg = line_chart(lines, width=350, height=170, x_label=x_label, unit_interval=spec.unit_interval)
    return (
        f'<figure class="card"><h3>{escape(spec.title)}</h3>{legend(lines)}{svg}'
        f'<p class="note">{escape(spec.note)}</p></figure>'
    )
