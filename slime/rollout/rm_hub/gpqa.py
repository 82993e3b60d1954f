r"""--rm-type gpqa: 1 if the response chooses the right letter of a multiple-choice question, else 0.

The choice is the last that the response declares: in \boxed{}, behind "answer" or "choice" ("The answer is (B)",
"Answer: **B**"), or the letter alone on the last line. The label is the right letter, or the text of the right choice
with metadata["choices"], the texts in their order. Letters: those of metadata["valid_letters"], else one a choice, else
A to D.
"""

from __future__ import annotations

import re
import string
from typing import Any

from slime.rollout.rm_hub.answers import extract_boxed
from slime.rollout.rm_hub.errors import RewardError, required_label
from slime.utils.types import Sample

_DECORATED = r"[\s*_(\[{$]*(?:\\(?:text|mathrm|mathbf|boxed)\s*\{\s*)?\(?([A-Z])(?![A-Za-z])"
_DECLARED = re.compile(rf"(?i:answer|choice|option)(?i:\s+is|\s+should\s+be)?[\s*_:=]*{_DECORATED}")
_ALONE = re.compile(rf"{_DECORATED}[\s*_)\]}}$.]*")


def gpqa_reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0. Raises RewardError where the label is no letter of the question and no text of a choice."""
    choices = [str(choice) for choice in sample.metadata.get("choices") or []]
    letters = _letters(sample, choices)
    right = _right_letter(sample, choices, letters)
    return float(chosen_letter(sample.response, letters) == right)


def chosen_letter(response: str, letters: str) -> str:
    """The last letter of `letters` that the response declares as its answer; "" where there is none."""
    boxed = extract_boxed(response)
    lines = response.strip().splitlines()
    candidates = [
        _ALONE.fullmatch(boxed),
        *reversed(list(_DECLARED.finditer(response))),
        _ALONE.fullmatch(lines[-1].strip()) if lines else None,
    ]
    return next((match[1] for match in candidates if match is not None and match[1] in letters), "")


def _letters(sample: Sample, choices: list[str]) -> str:
    given = sample.metadata.get("valid_letters")
    return "".join(map(str, given)).upper() if given else string.ascii_uppercase[: len(choices) or 4]


def _right_letter(sample: Sample, choices: list[str], letters: str) -> str:
    label = required_label("gpqa", sample).strip()
    if label.upper() in tuple(letters):
        return label.upper()
    if label in choices:
        return letters[choices.index(label)]
    raise RewardError("gpqa", sample.index, f"the label {label!r} is none of the letters {letters} nor of the choices")
