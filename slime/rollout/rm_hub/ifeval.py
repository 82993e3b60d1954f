"""The verifiable instructions of IFEval (arXiv:2311.07911, table 1): each a function of the response.

All but `language:response_language`, which needs a language detector. Sentences end at ".", "!" or "?" before a blank;
`english_capital` and `english_lowercase` look at the case alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Check = Callable[..., bool]  # check(response, **arguments of the instruction)

_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_MARKDOWN_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.IGNORECASE | re.DOTALL)


def follows(instruction: str, response: str, arguments: dict[str, Any]) -> bool:
    """Whether `response` follows one instruction; an empty one follows none.

    arguments: as the data set has them; those that are None are left out. Raises ValueError for wrong ones.
    """
    if not response.strip():
        return False
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return CHECKS[instruction](response, **given)
    except TypeError as error:
        raise ValueError(f"instruction {instruction!r} cannot be checked with {given}: {error}") from error


def _compare(count: int, relation: str, bound: int) -> bool:
    if relation == "at least":
        return count >= bound
    if relation == "less than":
        return count < bound
    raise ValueError(f"relation must be 'at least' or 'less than', got {relation!r}")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def _occurs(phrase: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _paragraphs(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def _keywords_exist(response: str, keywords: list[str]) -> bool:
    return all(_occurs(keyword, response) for keyword in keywords)


def _keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_occurs(keyword, response), relation, frequency)


def _no_forbidden_words(response: str, forbidden_words: list[str]) -> bool:
    return not any(_occurs(word, response) for word in forbidden_words)


def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def _number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    sentences = [part for part in re.split(r"[.!?]+[\"')\]*]*(?:\s+|$)", response) if part.strip()]
    return _compare(len(sentences), relation, num_sentences)


def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    return len(_paragraphs(response, r"\s?\*\*\*\s?")) == num_paragraphs


def _number_words(response: str, num_words: int, relation: str) -> bool:
    return _compare(len(_words(response)), relation, num_words)


def _first_word_of_paragraph(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = _paragraphs(response, r"\n\s*\n")
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    words = _words(paragraphs[nth_paragraph - 1])
    return bool(words) and words[0].lower() == first_word.lower()


def _number_placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]]+\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    letters = re.sub(r"[^A-Za-z]", "", postscript_marker)
    marker = r"\.?\s?".join(letters) if letters.upper() in ("PS", "PPS") else re.escape(postscript_marker)
    return re.search(rf"(?mi)^\s*\W*{marker}", response) is not None


def _number_bullets(response: str, num_bullets: int) -> bool:
    return len(re.findall(r"(?m)^\s*(?:\*(?!\*)|-(?!-))\s*\S", response)) == num_bullets


def _constrained_response(response: str) -> bool:
    return any(choice in response for choice in _CHOICES)


def _number_highlights(response: str, num_highlights: int) -> bool:
    highlights = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", response)
    return sum(bool("".join(parts).strip()) for parts in highlights) >= num_highlights


def _multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter)}\s?\d+", response)) >= num_sections


def _json_format(response: str) -> bool:
    fenced = _MARKDOWN_FENCE.fullmatch(response)
    try:
        json.loads(fenced[1] if fenced else response)
    except json.JSONDecodeError:
        return False
    return True


def _title(response: str) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^<>\n]+)>>", response))


def _two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    inner = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(response: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in _words(response)), capital_relation, capital_frequency)


CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords_exist,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _no_forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullets,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlights,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda response: "," not in response,
}
