"""--rm-type f1: overlap of words with the label, as SQuAD measures answers (arXiv:1606.05250, section 6.1).

Case, punctuation and the articles do not count; a word that stands twice counts twice.

    response "the Eiffel tower, Paris", label "Eiffel Tower"   ->   2 of 3 words right, 2 of 2 found: 0.8
"""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

from slime.rollout.rm_hub.errors import required_label
from slime.utils.types import Sample

_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1_reward(args: Any, sample: Sample) -> float:
    """Between 0.0 and 1.0. Raises ValueError for a sample without a label."""
    return f1_score(sample.response, required_label("f1", sample))


def f1_score(answer: str, label: str) -> float:
    """The harmonic mean of precision and recall of the words; two texts without words are equal."""
    given, wanted = _words(answer), _words(label)
    if not given or not wanted:
        return float(given == wanted)
    num_shared = sum((Counter(given) & Counter(wanted)).values())
    return 2.0 * num_shared / (len(given) + len(wanted))


def _words(text: str) -> list[str]:
    return [word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES]
