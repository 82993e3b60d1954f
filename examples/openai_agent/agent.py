"""An agent that knows the OpenAI protocol and nothing of slime. Trained, it is given slime's base URL instead.

`openai.OpenAI(base_url=base_url, api_key="none")` does as well; this one posts by itself, to need no further package.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

MAX_TURNS = 3
DEADLINE_S = 60.0


def run(base_url: str, sample: Any) -> float:
    """Ask for the sum, and again while it is wrong. Returns the reward: 1, less 0.25 for each further turn."""
    messages = list(sample.prompt)
    for turn in range(MAX_TURNS):
        answer = complete(base_url, messages)
        if (answer["content"] or "").strip() == sample.label:
            return 1.0 - 0.25 * turn
        messages += [answer, {"role": "user", "content": "That is wrong."}]
    return 0.0


def complete(base_url: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The next message of the conversation, from any server that speaks the protocol."""
    body = json.dumps({"model": "policy", "messages": messages, "max_tokens": 16}).encode()
    request = urllib.request.Request(
        f"{base_url}/chat/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        message: dict[str, Any] = json.loads(answer.read())["choices"][0]["message"]
    return message
