"""`learning_curve.png`: training reward and held-out accuracy over the rollouts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from slime.observability.report.charts import learning_lines
from slime.observability.report.run import Run, finite
from slime.observability.report.svg import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#2563c9", "#d9730d", "#2b8a55", "#8b53c6", "#c93a4b", "#128a95", "#9a7b1c", "#7a828f")
_INK, _SOFT, _RULE = "#1d2026", "#646b78", "#e4e6ea"


def draw_learning_curve(run: Run, path: Path) -> None:
    """Write the picture; one without data says so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = learning_lines(run)
    for line in lines:
        _draw(axes, line)
    _dress(axes, lines)
    figure.savefig(path)


def _draw(axes: Axes, line: Line) -> None:
    color = _COLORS[line.color]
    if line.style == "faint":
        axes.plot(line.xs, line.ys, color=color, linewidth=0.9, alpha=0.3)
        return
    is_dots = line.style == "dots" or len(line.xs) == 1
    (drawn,) = axes.plot(line.xs, line.ys, color=color, linewidth=2.2, label=line.label, zorder=4 if is_dots else 3)
    if is_dots:
        drawn.set(marker="o", markersize=5.5, markeredgecolor="white")
    if line.style == "dots":
        points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
        places = [(points[-1], (4, 9), "right")] + ([(points[0], (6, -13), "left")] if len(points) > 1 else [])
        for (x, y), offset, side in places:
            value = axes.annotate(f"{y:.3f}", (x, y), offset, textcoords="offset points", ha=side)
            value.set(color=color, fontsize=10, fontweight="bold")


def _dress(axes: Axes, lines: list[Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = finite([y for line in lines for y in line.ys])
    if not values:
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color=_SOFT)
    elif min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(-0.02, 1.1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_xlabel("rollout", color=_SOFT)
    axes.set_ylabel("reward", color=_SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=_SOFT, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    if lines:
        axes.legend(loc="lower right", frameon=False, labelcolor=_INK)
