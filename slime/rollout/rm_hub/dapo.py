r"""--rm-type dapo: the rule of DAPO (arXiv:2503.14476, section 2.3): 1 if the final answer is right, else -1.

The final answer is what follows the last "Answer:", up to the end of its line, normalised as in Minerva
(arXiv:2206.14858, appendix D.1): units, spacing commands and dollar signs do not count, nor do commas in a number, and
\frac12 is \frac{1}{2}.

    "... so a=3.\nAnswer: \boxed{1,\!000} \text{ cm}", label "1000"  ->  {"score": 1.0, "acc": True, "pred": "1000"}
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from slime.rollout.rm_hub.answers import extract_boxed
from slime.rollout.rm_hub.errors import required_label
from slime.utils.types import Sample

_ANSWER_LINE = re.compile(r"answer\s*:[ \t*]*([^\n]+)", re.IGNORECASE)
_UNITS = (
    "square|cubic|ways?|integers?|dollars?|cents?|mph|inch|inches|feet|foot|ft|hours?|minutes?|seconds?|days?|km|cm|mm|"
    "meters?|miles?|pounds?|kg|grams?|gm|units?|points?|digits?|degrees?|students?|meals?|edges?|multiples?|percent"
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:text|textbf|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r" \1 "),  # mostly a unit: seen to below
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|~|\*\*", ""),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\?%|\\?\$", ""),
        (r"(?<=\d)(?:\{,\}|,)(?=\d{3}(?!\d))", ""),
        (rf"(?<![A-Za-z\\])(?:an?|the|{_UNITS})(?![A-Za-z])", ""),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\s+", ""),
        (r"(?<=\d)\.0+$|\.+$", ""),
    )
)


def dapo_reward(args: Any, sample: Sample) -> dict[str, Any]:
    """{"score": 1.0 or -1.0, "acc": whether it is right, "pred": the answer as compared, "" where there is none}."""
    pred = final_answer(sample.response)
    is_right = pred != "" and pred == normalize(required_label("dapo", sample))
    return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": pred}


def final_answer(response: str) -> str:
    """The normalised text behind the last "Answer:"; "" where there is none."""
    answers = _ANSWER_LINE.findall(response)
    return normalize(answers[-1]) if answers else ""


@lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """`answer` in the one spelling in which two answers are compared."""
    answer = extract_boxed(answer) or answer
    answer = answer.split("=")[-1]
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer
