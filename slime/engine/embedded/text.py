"""Text of generated tokens: whole, as it grows, and where a stop string ends it."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\ufffd"
"""What an incomplete multi-byte character decodes to."""


class GrowingText:
    """The text of a growing list of tokens, decoded from where it was last complete; unfinished characters wait."""

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool) -> None:
        self.text = ""
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window_start = 0
        self._num_read = 0

    def update(self, tokens: list[int]) -> str:
        """The text of `tokens`, which continue those of the last call, up to the last complete character."""
        known = self._decode(tokens[self._window_start : self._num_read])
        window = self._decode(tokens[self._window_start :])
        if len(window) > len(known) and not window.endswith(REPLACEMENT):
            self.text += window[len(known) :]
            self._window_start, self._num_read = self._num_read, len(tokens)
        return self.text

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens, skip_special_tokens=self._skip)


class StopChecker:
    """Finds stop strings in a growing answer."""

    def __init__(self, tokenizer: Any, stop: list[str], *, skip_special_tokens: bool) -> None:
        self._stop = stop
        self._longest = max(map(len, stop))
        self._text = GrowingText(tokenizer, skip_special_tokens=skip_special_tokens)

    def check(self, tokens: list[int]) -> str | None:
        """The first stop string that the text of `tokens` contains, if any."""
        start = max(0, len(self._text.text) - self._longest + 1)
        tail = self._text.update(tokens)[start:]
        return next((string for string in self._stop if string in tail), None)


def decode(tokenizer: Any, tokens: list[int], *, skip_special_tokens: bool) -> str:
    """The text of tokens."""
    if not tokens:
        return ""
    text: str = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text


def held_back(text: str, stop: list[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string, and so must not be sent yet."""
    longest = max((len(string) for string in stop), default=0) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-count:]) for string in stop):
            return count
    return 0
