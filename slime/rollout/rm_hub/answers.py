r"""Finding the final answer in a response."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace


def extract_boxed(text: str) -> str:
    r"""What stands in the last \boxed{...} of `text`, braces balanced; "" where there is none or it never closes."""
    openings = list(_BOXED.finditer(text))
    if not openings:
        return ""
    start = openings[-1].end()
    depth = 1
    for brace in _BRACE.finditer(text, start):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : brace.start()].strip()
    return ""
