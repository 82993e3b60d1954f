"""Token ids and loss masks of multi-turn conversations, found by template difference.

A turn is trained on exactly where the policy would have sampled it: from the end of the generation prompt to the
token that ends the turn. For a Qwen conversation (step_loss_mask 1 is the default, 0 leaves a turn out):

    <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nhello<|im_end|>\\n
     0           0     0  0         0  0           0        0  1    1         0

Where a turn stands is never counted by hand: with render(.) the tokenizer's own template, `render(turns before, with the
generation prompt)` must be a prefix of `render(turns up to this one)`, and that of `render(the whole conversation)`.
The families differ in what their template does to earlier turns:

    qwen          nothing: every rendering is a prefix of the longer one
    qwen3         drops the reasoning before the last user message: such a turn is trained on as the whole rendering has
                  it, and is an error if that lost any of its content
    distill_qwen  drops the reasoning of every turn: only the last turn can be trained on, put behind the generation
                  prompt with its reasoning
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from slime.utils.types import Message

TOKENIZER_TYPES = ("qwen", "qwen3", "distill_qwen")

_PROBE = "slime-loss-mask-probe"


class Segment(NamedTuple):
    """A piece of the rendered conversation."""

    text: str
    is_trained: bool
