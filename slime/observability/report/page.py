"""The page: headline numbers, learning curve, health, time, samples, arguments."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime
from html import escape
from typing import NamedTuple

from slime.observability.report.charts import learning_chart, small_charts
from slime.observability.report.run import Run, duration, finite, short, smoothing_window, trailing_mean
from slime.observability.report.samples import samples_section
from slime.observability.report.staleness import staleness_card
from slime.observability.report.style import STYLE
from slime.observability.report.waterfall import time_section
from slime.observability.tracking import Series


class Tile(NamedTuple):
    """One headline number."""

    label: str
    value: str
    detail: str


def render_page(run: Run) -> str:
    """The HTML document; it refers to nothing outside itself."""
    sections = [
        ("Learning", learning_chart(run)),
        ("Health of the run", small_charts(run) + staleness_card(run)),
        ("Where the time goes", time_section(run)),
        ("Samples", samples_section(run)),
        ("Arguments", _arguments(run)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    tiles = "".join(
        f"<div class=tile><small>{escape(label)}</small><b>{escape(value)}</b><small>{escape(detail)}</small></div>"
        for label, value, detail in headline(run)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · slime report</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(run.name)}</h1><p class="lead">{escape(_lead(run))}</p></header>'
        f'<div class="tiles">{tiles}</div>{body}'
        "<footer>Written by <code>slime report</code> from metrics.jsonl, phases.jsonl, samples/ and args.yaml "
        "of the run directory.</footer></body></html>\n"
    )


def headline(run: Run) -> list[Tile]:
    """The numbers at the top: only those that are known."""
    tiles = [_before_after(f"held-out {name}", series) for name, series in run.evals.items() if finite(series.values)]
    reward = run.reward
    if finite(reward.values):
        smooth = trailing_mean(reward.values, smoothing_window(len(reward.values)))
        tiles.append(_before_after("training reward", Series(reward.steps, smooth, reward.times)))
    num_steps = len(run.series("train/step", "train/loss").steps)
    detail = f"{num_steps:,} optimizer steps" if num_steps else ""
    tiles.append(Tile("rollouts", f"{run.num_rollouts:,}", detail))
    num_starts = len(run.start_times)
    tiles.append(Tile("wall time", duration(run.wall_s), f"in {num_starts} sessions" if num_starts > 1 else ""))
    throughput = finite(run.series("rollout/step", "perf/tokens_per_sec").values)
    if throughput:
        tiles.append(Tile("tokens/s sampled", short(statistics.median(throughput)), "median of the rollouts"))
    step_s = finite(run.series("rollout/step", "perf/step_time").values)
    if step_s:
        tiles.append(Tile("seconds per step", short(statistics.median(step_s)), "median"))
    return tiles


def _before_after(label: str, series: Series) -> Tile:
    points = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if value == value]
    (first_step, first), (last_step, last) = points[0], points[-1]
    if len(points) == 1:
        return Tile(label, f"{first:.3f}", f"at rollout {first_step}")
    return Tile(label, f"{first:.3f} → {last:.3f}", f"rollout {first_step} to {last_step}")


def _lead(run: Run) -> str:
    starts = run.start_times
    when = datetime.fromtimestamp(starts[0], UTC).strftime("started %Y-%m-%d %H:%M UTC") if starts else ""
    if not run.num_rollouts:
        return f"{when} · no rollout is done yet".removeprefix(" · ")
    done = f"{run.num_rollouts} rollout{'s' if run.num_rollouts > 1 else ''}"
    resumed = [f"{value:g}" for value in run.series("session", "start_rollout_id").values[1:]]
    again = f" · resumed at rollout {', '.join(resumed)}" if resumed else ""
    return f"{when} · {done} · {duration(run.wall_s)}{again}".removeprefix(" · ")


def _arguments(run: Run) -> str:
    if run.arguments is None:
        return '<p class="missing">No args.yaml in the run directory.</p>'
    return f"<details><summary>All arguments of the run</summary><pre>{escape(run.arguments)}</pre></details>"
