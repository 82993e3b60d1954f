"""Line charts as SVG text. Colours are classes `c0`..`c7` of the style sheet, so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

from slime.observability.report.run import finite, short

_MAX_POINTS = 240
_MAX_HOVER_POINTS = 120


@dataclass(frozen=True)
class Line:
    """One series. style: "line", "faint" (behind another), "dots" (a line with a mark at each point).

    band: the lowest and highest value at each x, drawn as an area.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    style: Literal["line", "faint", "dots"] = "line"
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Frame:
    """The plot area in SVG units and the data range that it shows."""

    width: int
    height: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: int = 44
    right: int = 10
    top: int = 8
    bottom: int = 22

    def x(self, value: float) -> float:
        inner = self.width - self.left - self.right
        return round(self.left + inner * (value - self.x_low) / (self.x_high - self.x_low), 1)

    def y(self, value: float) -> float:
        inner = self.height - self.top - self.bottom
        return round(self.top + inner * (1 - (value - self.y_low) / (self.y_high - self.y_low)), 1)


def line_chart(lines: Sequence[Line], *, width: int, height: int, x_label: str, unit_interval: bool = False) -> str:
    """An SVG of `lines` over a common x axis. unit_interval: show 0 to 1 where all values lie in it."""
    lines = [_thinned(line) for line in lines]
    xs = [x for line in lines for x in line.xs]
    ys = finite([y for line in lines for values in (line.ys, *(line.band or ())) for y in values])
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = y_range(ys, unit_interval=unit_interval)
    pad = 0.5 if x_high == x_low else 0.0
    frame = Frame(width, height, x_low - pad, x_high + pad, y_low, y_high)
    marks = [_marks(frame, line) for line in sorted(lines, key=lambda line: line.style != "faint")]
    hover = [_hover(frame, line, x_label) for line in lines if line.style != "faint"]
    return wrap(frame, axes(frame, x_label) + "".join(marks) + "".join(hover))


def wrap(frame: Frame, body: str) -> str:
    """`body` as a picture of the frame's size."""
    return f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img">{body}</svg>'


def axes(frame: Frame, x_label: str) -> str:
    """Horizontal grid lines with their values, and the x axis with whole-numbered ticks."""
    parts = []
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    for value in ticks(frame.y_low, frame.y_high, max(2, frame.height // 42)):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left} {y}H{right}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6}" y="{y + 3.5}" text-anchor="end">{short(value)}</text>')
    for value in ticks(frame.x_low, frame.x_high, max(2, frame.width // 80)):
        if value == int(value):
            parts.append(
                f'<text class="tick" x="{frame.x(value)}" y="{floor + 15}" text-anchor="middle">{value:g}</text>'
            )
    parts.append(f'<path class="axis" d="M{frame.left} {floor}H{right}"/>')
    parts.append(
        f'<text class="tick" x="{frame.left - 10}" y="{floor + 15}" text-anchor="end">{escape(x_label)}</text>'
    )
    return "".join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten apart) between `low` and `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def y_range(ys: Sequence[float], *, unit_interval: bool) -> tuple[float, float]:
    """The range to show: 0 to 1 if asked for and enough, from 0 where the values span much of it, else their own."""
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    if unit_interval and low >= 0 and high <= 1:
        return 0.0, 1.05
    if high - low < 1e-12 * max(1e-300, abs(high), abs(low)) or high == low:
        pad = abs(high) * 0.1 or 1.0
        return (0.0 if low >= 0 and not low else low - pad), high + pad
    pad = 0.06 * (high - low)
    starts_at_zero = 0 <= low <= 0.7 * high
    return (0.0 if starts_at_zero else low - pad), high + pad


def _thinned(line: Line) -> Line:
    """At most 240 points: means of equal runs of points, least and greatest for the band."""
    if len(line.xs) <= _MAX_POINTS:
        return line
    size = math.ceil(len(line.xs) / _MAX_POINTS)
    cuts = [slice(start, start + size) for start in range(0, len(line.xs), size)]
    band = None
    if line.band is not None:
        low, high = line.band
        band = [min(low[cut]) for cut in cuts], [max(high[cut]) for cut in cuts]
    return Line(
        line.label,
        [line.xs[cut][-1] for cut in cuts],
        [_mean(finite(line.ys[cut])) for cut in cuts],
        line.color,
        line.style,
        band,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _marks(frame: Frame, line: Line) -> str:
    parts = []
    points = list(zip(line.xs, line.ys, strict=True))
    if line.band is not None:
        low, high = line.band
        edge = [*zip(line.xs, high, strict=True), *reversed(list(zip(line.xs, low, strict=True)))]
        path = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in edge if math.isfinite(y))
        parts.append(f'<path class="band c{line.color}" d="M{path}Z"/>')
    for is_drawn, run in groupby(points, key=lambda point: math.isfinite(point[1])):
        stretch = list(run) if is_drawn else []
        if len(stretch) > 1:
            path = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in stretch)
            parts.append(f'<path class="line {line.style} c{line.color}" d="M{path}"/>')
        if len(stretch) == 1 or line.style == "dots":
            dots = (
                f'<circle class="dot c{line.color}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="3"/>' for x, y in stretch
            )
            parts.extend(dots)
    if line.style == "dots":
        parts.extend(_end_values(frame, line))
    return "".join(parts)


def _end_values(frame: Frame, line: Line) -> list[str]:
    """The first value written below its mark, the last above."""
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    (first_x, first), (last_x, last) = points[0], points[-1]
    places = [(last_x, last, -10, "end")]
    if len(points) > 1:
        places.append((first_x, first, 20, "start"))
    return [
        f'<text class="value c{line.color}" x="{frame.x(x)}" y="{frame.y(y) + offset}" '
        f'text-anchor="{anchor}">{y:.3f}</text>'
        for x, y, offset, anchor in places
    ]


def _hover(frame: Frame, line: Line, x_label: str) -> str:
    """Invisible circles whose titles a browser shows under the pointer."""
    stride = math.ceil(len(line.xs) / _MAX_HOVER_POINTS)
    return "".join(
        f'<circle class="hover" cx="{frame.x(x)}" cy="{frame.y(y)}" r="7">'
        f"<title>{escape(line.label)} {short(y)} at {escape(x_label)} {x:g}</title></circle>"
        for x, y in list(zip(line.xs, line.ys, strict=True))[::stride]
        if math.isfinite(y)
    )
