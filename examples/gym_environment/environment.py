"""A game with the interface of a gym environment: guess a number between 0 and 99."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple


class Step(NamedTuple):
    """What an action led to. terminated: the game is won; truncated: its moves are used up."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class GuessNumber:
    """The player is told "higher" or "lower"; the earlier the right guess, the better."""

    def __init__(self, num_moves: int = 4) -> None:
        self.num_moves = num_moves
        self.secret = 0
        self.num_made = 0

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """A new game. Returns the first observation, and nothing else to know."""
        self.secret = random.Random(seed).randrange(100)
        self.num_made = 0
        return "Guess my number between 0 and 99.", {}

    def step(self, action: str) -> Step:
        """One guess: the first number in `action`."""
        self.num_made += 1
        truncated = self.num_made == self.num_moves
        number = re.search(r"\d+", action)
        if number is None:
            return Step("Say a number.", -0.1, False, truncated, {})
        guess = int(number[0])
        if guess == self.secret:
            return Step("Right!", 1.0 - 0.1 * (self.num_made - 1), True, False, {})
        return Step("higher" if guess < self.secret else "lower", 0.0, False, truncated, {})
