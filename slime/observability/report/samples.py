"""Prompts and responses of a few samples, token by token: what was trained on is tinted, what was not is grey."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from slime.observability.report.run import Run, short

_VISIBLE = {"\n": "⏎\n", "\t": "⇥\t"}


def samples_section(run: Run) -> str:
    """Best, worst and other samples of the last rollout, and folded those of the first."""
    if not run.samples:
        return '<p class="missing">No samples were kept in this run.</p>'
    first, last = min(run.samples), max(run.samples)
    parts = [
        '<p class="note"><span class="tok on">Tinted tokens</span> were sampled by the policy and are trained on; '
        '<span class="tok off">grey ones</span> are not (loss mask 0). Point at a token for its log-probability.</p>',
        f"<h3>Rollout {last}</h3>{_cards(run.samples[last])}",
    ]
    if first != last:
        parts.append(
            f"<details><summary>Rollout {first}, for comparison</summary>{_cards(run.samples[first])}</details>"
        )
    return "".join(parts)


def _cards(records: Sequence[dict[str, Any]]) -> str:
    return f'<div class="grid2">{"".join(_card(record) for record in records)}</div>'


def _card(record: dict[str, Any]) -> str:
    reward = "no reward" if record["reward"] is None else f"reward {short(record['reward'])}"
    facts = [f'<b class="pick {escape(record["pick"])}">{escape(record["pick"])}</b>', f"<b>{reward}</b>"]
    if record["label"] is not None:
        facts.append(f"label <code>{escape(str(record['label']))}</code>")
    facts += [escape(record["status"]), f"group {record['group_index']}"]
    if record["weight_versions"]:
        facts.append(f"weights v{escape('–'.join(record['weight_versions']))}")
    failure = f'<p class="failure">{escape(record["failure"])}</p>' if record["failure"] else ""
    return (
        f'<article class="card sample"><p class="facts">{" · ".join(facts)}</p>{failure}'
        f'<pre class="prompt">{escape(record["prompt"])}</pre><pre class="response">{_tokens(record)}</pre></article>'
    )


def _tokens(record: dict[str, Any]) -> str:
    tokens, mask = record["tokens"], record["loss_mask"]
    if not tokens:
        return '<span class="missing">no response</span>'
    position, count = record["omitted"] or (None, 0)
    parts = []
    for i, (token, trained) in enumerate(zip(tokens, mask, strict=True)):
        if i == position:
            parts.append(f'<span class="omitted"> … {count:,} tokens … </span>')
        parts.append(_token(record, i, token, bool(trained)))
    return "".join(parts)


def _token(record: dict[str, Any], i: int, token: str, trained: bool) -> str:
    engine = record["rollout_log_probs"][i] if record["rollout_log_probs"] else None
    title = f' title="{engine:.4f}"' if engine is not None and trained else ""
    classes = f"tok {'on' if trained else 'off'}"
    text = "".join(_VISIBLE.get(char, char) for char in escape(token))
    return f'<span class="{classes}"{title}>{text}</span>'
