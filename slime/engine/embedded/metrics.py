"""The engine's numbers in Prometheus' text format, under SGLang's names where it has them."""

from __future__ import annotations

from slime.engine.embedded.engine import Engine, describe


def prometheus_text(engine: Engine) -> str:
    """All metrics, one line each after its type."""
    state, counters = describe(engine), engine.scheduler.counters
    total_tokens = state["max_total_num_tokens"]
    hit_rate = counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0
    gauges = {
        "num_running_reqs": state["num_running_reqs"],
        "num_queue_reqs": state["num_waiting_reqs"],
        "num_used_tokens": state["num_used_tokens"],
        "max_total_num_tokens": total_tokens,
        "token_usage": state["num_used_tokens"] / total_tokens,
        "cache_hit_rate": hit_rate,
        "is_paused": int(state["is_paused"]),
    }
    totals = {
        "prompt_tokens_total": counters.prompt_tokens,
        "cached_tokens_total": counters.cached_tokens,
        "generation_tokens_total": counters.generated_tokens,
        "num_requests_total": counters.num_finished,
        "num_aborted_requests_total": counters.num_aborted,
        "num_retractions_total": counters.num_retractions,
        "num_steps_total": counters.num_steps,
    }
    lines = [f"# TYPE sglang:{name} gauge\nsglang:{name} {value}" for name, value in gauges.items()]
    lines += [f"# TYPE sglang:{name} counter\nsglang:{name} {value}" for name, value in totals.items()]
    return "\n".join(lines) + "\n"
