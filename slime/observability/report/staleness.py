"""How old the weights were that sampled what was trained on: a histogram over the run."""

from __future__ import annotations

from slime.observability.metrics import STALENESS_COUNT
from slime.observability.report.run import Run, finite

_LOST = {
    "rollout/staleness/num_refreshed": "groups were too old and sampled anew",
    "rollout/staleness/num_dropped": "groups were too old and left out",
}


def staleness_card(run: Run) -> str:
    """A table with a bar for each age; nothing where all samples came from the newest weights."""
    counts = staleness_counts(run)
    if not any(counts):
        return ""
    total = sum(counts.values())
    rows = "".join(
        f'<tr><td>{age}</td><td>{count:,}</td><td><span class="share c0" '
        f'style="width:{60 * count / total:.0f}px"></span>{count / total:.0%}</td></tr>'
        for age, count in sorted(counts.items())
    )
    head = "<tr><th>versions behind</th><th>samples</th><th>share</th></tr>"
    lost = [(sum(finite(run.series("rollout/step", key).values)), text) for key, text in _LOST.items()]
    notes = "".join(f'<p class="note">{count:.0f} {text}.</p>' for count, text in lost if count)
    return (
        f'<figure class="card"><h3>Samples by staleness</h3><table class="phases">{head}{rows}</table>{notes}</figure>'
    )


def staleness_counts(run: Run) -> dict[int, int]:
    """`{age: samples}` over all rollouts."""
    counts: dict[int, int] = {}
    for key, series in run.metrics.get("rollout/step", {}).items():
        if key.startswith(STALENESS_COUNT):
            counts[int(key.removeprefix(STALENESS_COUNT))] = round(sum(finite(series.values)))
    return counts
