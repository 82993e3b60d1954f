"""The report of a run: one HTML file that needs nothing else, and a picture of its learning curve.

run.py        reads a run directory            page.py      puts the page together
charts.py     which metrics are drawn, why     samples.py   prompts and responses, token by token
waterfall.py  where the time goes              picture.py   learning_curve.png
svg.py        axes, lines and bars as SVG      style.py     the style sheet
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from slime.observability.report.page import render_page
from slime.observability.report.picture import draw_learning_curve
from slime.observability.report.run import read_run


class ReportPaths(NamedTuple):
    """The files that a report consists of."""

    html: Path
    png: Path


def write_report(run_dir: Path, output: Path | None = None) -> ReportPaths:
    """Write the report of a run, finished or not, and return where it is.

    output: the HTML file, default `report.html` in the run directory; `learning_curve.png` is written beside it.
    Raises ValueError, one sentence, where `run_dir` is no run or a file of it is damaged.
    """
    run = read_run(run_dir)
    html = output if output is not None else run_dir / "report.html"
    paths = ReportPaths(html, html.with_name("learning_curve.png"))
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(render_page(run), encoding="utf-8")
    draw_learning_curve(run, paths.png)
    return paths
