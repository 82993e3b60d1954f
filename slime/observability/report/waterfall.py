"""Where the time goes: seconds by phase over the run, and the last rollouts as a waterfall, process by process."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from slime.observability.report.run import Run, duration, short
from slime.observability.report.svg import Frame, axes, ticks, wrap
from slime.observability.timer import PhaseRecord

_MAX_BARS = 60
_NUM_SHOWN = 2  # rollouts in the waterfall
_LAST_COLOR = 7  # grey: the eighth phase and all that take less
_ROW = 20
_SLACK_S = 1e-4  # stamps of nested phases may differ by the clock's grain


class Span(NamedTuple):
    """A phase with its nesting depth and the seconds that none of its inner phases account for."""

    record: PhaseRecord
    depth: int
    own_s: float


def time_section(run: Run) -> str:
    """The section's body; says so where nothing was recorded."""
    if not run.phases:
        return '<p class="missing">No phases.jsonl: nothing is known of where the time went.</p>'
    spans_by_process = {process: spans_of(records) for process, records in _by_process(run.phases).items()}
    main = "driver" if "driver" in spans_by_process else next(iter(spans_by_process))
    own = own_seconds(spans_by_process[main])
    colors = {name: min(i, _LAST_COLOR) for i, name in enumerate(_phase_names(spans_by_process))}
    return (
        f'<div class="grid2"><figure class="card"><h3>Seconds per rollout, {escape(main)}</h3>'
        f"{_bars(own, colors)}</figure>"
        f'<figure class="card"><h3>By phase</h3>{_table(own, colors)}</figure></div>'
        f'<figure class="card"><h3>{_title(run.phases)}</h3>{_waterfall(spans_by_process, colors)}'
        f"</figure>"
    )


def spans_of(records: Iterable[PhaseRecord]) -> list[Span]:
    """The phases of one process with their nesting, reckoned from the stamps: inner lies within outer."""
    spans: list[Span] = []
    stack: list[tuple[PhaseRecord, int]] = []  # open phases and their place in `spans`
    for record in sorted(records, key=lambda record: (record.start, -record.end)):
        while stack and not _lies_within(record, stack[-1][0]):
            stack.pop()
        if stack:
            outer = stack[-1][1]
            left = spans[outer].own_s - (record.end - record.start)
            spans[outer] = spans[outer]._replace(own_s=max(0.0, left))
        spans.append(Span(record, len(stack), record.end - record.start))
        stack.append((record, len(spans) - 1))
    return spans


def own_seconds(spans: Sequence[Span]) -> dict[int, dict[str, float]]:
    """`{rollout_id: {phase: seconds}}`, each second counted once, under its innermost phase."""
    seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        seconds[span.record.rollout_id][span.record.phase] += span.own_s
    return {rollout_id: dict(by_phase) for rollout_id, by_phase in sorted(seconds.items())}


def _lies_within(inner: PhaseRecord, outer: PhaseRecord) -> bool:
    return inner.start >= outer.start - _SLACK_S and inner.end <= outer.end + _SLACK_S


def _by_process(records: Sequence[PhaseRecord]) -> dict[str, list[PhaseRecord]]:
    by_process: defaultdict[str, list[PhaseRecord]] = defaultdict(list)
    for record in records:
        by_process[record.process].append(record)
    return dict(sorted(by_process.items(), key=lambda entry: (entry[0] != "driver", entry[0])))


def _phase_names(spans_by_process: dict[str, list[Span]]) -> list[str]:
    """All phases, those that took most time first."""
    totals: defaultdict[str, float] = defaultdict(float)
    for spans in spans_by_process.values():
        for span in spans:
            totals[span.record.phase] += span.own_s
    return sorted(totals, key=lambda name: -totals[name])


def _bars(own: dict[int, dict[str, float]], colors: dict[str, int]) -> str:
    """One stacked bar a rollout; runs of rollouts share a bar (their mean) where there are many."""
    size = math.ceil(len(own) / _MAX_BARS)
    ids, order = list(own), _in_order(own)
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    stacks = [
        {
            name: sum(own[i].get(name, 0.0) for i in chunk) / len(chunk)
            for name in order
            if any(name in own[i] for i in chunk)
        }
        for chunk in chunks
    ]
    tallest = max(sum(stack.values()) for stack in stacks) or 1.0
    frame = Frame(560, 230, ids[0] - 0.5, ids[-1] + 0.5, 0.0, tallest * 1.05)
    parts = []
    for chunk, stack in zip(chunks, stacks, strict=True):
        left, right = frame.x(chunk[0] - 0.5), frame.x(chunk[-1] + 0.5)
        gap = min(2.0, 0.2 * (right - left))
        bottom = 0.0
        for name, seconds in stack.items():
            y, height = frame.y(bottom + seconds), frame.y(bottom) - frame.y(bottom + seconds)
            title = f"rollout {chunk[0]}: {name} {short(seconds)} s"
            parts.append(_rect((left + gap / 2, y, right - left - gap, height), colors[name], title))
            bottom += seconds
    return wrap(frame, axes(frame, "rollout") + "".join(parts))


def _in_order(own: dict[int, dict[str, float]]) -> list[str]:
    """The phases in the order in which they run."""
    return list(dict.fromkeys(name for by_phase in own.values() for name in by_phase))


def _table(own: dict[int, dict[str, float]], colors: dict[str, int]) -> str:
    totals = {name: sum(by_phase.get(name, 0.0) for by_phase in own.values()) for name in _in_order(own)}
    everything = sum(totals.values()) or 1.0
    rows = []
    for name, total in totals.items():
        per_rollout = [by_phase[name] for by_phase in own.values() if name in by_phase]
        share = total / everything
        if share >= 0.001:  # a phase that only holds others has no time of its own
            rows.append(
                f'<tr><td><i class="swatch c{colors[name]}"></i>{escape(name)}</td>'
                f"<td>{short(statistics.median(per_rollout))} s</td><td>{duration(total)}</td>"
                f'<td><span class="share c{colors[name]}" style="width:{share * 60:.0f}px"></span>{share:.0%}</td></tr>'
            )
    head = "<tr><th>phase</th><th>median</th><th>in all</th><th>share</th></tr>"
    return f'<table class="phases">{head}{"".join(rows)}</table>'


def _title(phases: Sequence[PhaseRecord]) -> str:
    ids = sorted({record.rollout_id for record in phases})[-_NUM_SHOWN:]
    return f"Waterfall of rollout{'s' if len(ids) > 1 else ''} {' and '.join(map(str, ids))}"


def _waterfall(spans_by_process: dict[str, list[Span]], colors: dict[str, int]) -> str:
    """A row for each process and nesting depth, time to the right."""
    ids = sorted({span.record.rollout_id for spans in spans_by_process.values() for span in spans})[-_NUM_SHOWN:]
    shown = {
        process: kept
        for process, spans in spans_by_process.items()
        if (kept := [span for span in spans if span.record.rollout_id in ids])
    }
    start = min(span.record.start for spans in shown.values() for span in spans)
    end = max(span.record.end for spans in shown.values() for span in spans)
    rows = {
        (process, depth): i
        for i, (process, depth) in enumerate(
            (process, depth)
            for process, spans in shown.items()
            for depth in range(1 + max(span.depth for span in spans))
        )
    }
    frame = Frame(1080, 30 + _ROW * len(rows), 0.0, max(end - start, 1e-3), 0.0, 1.0, left=96, top=4)
    parts = [_time_axis(frame)]
    for (process, depth), row in rows.items():
        y = frame.top + row * _ROW
        if depth == 0:
            place = f'x="{frame.left - 8}" y="{y + 13}" text-anchor="end"'
            parts.append(f'<text class="tick strong" {place}>{escape(process)}</text>')
        for span in shown[process]:
            if span.depth == depth:
                parts.append(_span_box(frame, span, start, y, colors[span.record.phase]))
    return _legend(shown, colors) + wrap(frame, "".join(parts))


def _legend(shown: dict[str, list[Span]], colors: dict[str, int]) -> str:
    """A swatch for each phase that has a colour of its own; the grey ones share the last."""
    names = dict.fromkeys(span.record.phase for spans in shown.values() for span in spans)
    grey = [name for name in names if colors[name] == _LAST_COLOR]
    entries = [(name, colors[name]) for name in names if name not in grey]
    entries += [(", ".join(grey), _LAST_COLOR)] if grey else []
    swatches = (f'<span><i class="swatch c{color}"></i>{escape(name)}</span>' for name, color in entries)
    return f'<figcaption class="legend">{"".join(swatches)}</figcaption>'


def _time_axis(frame: Frame) -> str:
    floor = frame.height - frame.bottom
    return "".join(
        f'<path class="grid" d="M{frame.x(value)} {frame.top}V{floor}"/>'
        f'<text class="tick" x="{frame.x(value)}" y="{floor + 15}" text-anchor="middle">{short(value)} s</text>'
        for value in ticks(frame.x_low, frame.x_high, 10)
    )


def _span_box(frame: Frame, span: Span, start: float, y: float, color: int) -> str:
    record = span.record
    left, right = frame.x(record.start - start), frame.x(record.end - start)
    width = max(1.0, right - left)
    title = f"rollout {record.rollout_id}: {record.phase} {short(record.end - record.start)} s"
    label = ""
    if width > 7 * len(record.phase) + 8:
        label = f'<text class="inside" x="{left + 5:.1f}" y="{y + 13}">{escape(record.phase)}</text>'
    return _rect((left, y + 1, width, _ROW - 3), color, title) + label


def _rect(box: tuple[float, float, float, float], color: int, title: str) -> str:
    x, y, width, height = box
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(0.0, height):.1f}"'
    return f'<rect class="fill c{color}" {place} rx="1.5"><title>{escape(title)}</title></rect>'
