"""A calculator as a tool, inside one assistant turn.

The model writes `<calc>12+30</calc>`; generation stops there, `<result>42</result>` is put behind it, which is not
trained on, and the model goes on. Needs `--rollout-stop "</calc>"`.
"""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

from slime.rollout.sglang_rollout import generate as sample_once
from slime.rollout.tokenizer import tokenizer_of
from slime.utils.types import Sample, SampleStatus

MAX_CALLS = 4
_CALL = re.compile(r"<calc>([^<>]*)</calc>$")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    """Sample, calculate, sample on: until the model ends without a call, or has used its calls."""
    tokenizer = tokenizer_of(args)
    if not isinstance(sample.prompt, str):
        sample.prompt = tokenizer.apply_chat_template(sample.prompt, tokenize=False, add_generation_prompt=True)
        sample.tokens = []
    for _ in range(MAX_CALLS):
        params = sampling_params | {"no_stop_trim": True}
        await sample_once(args, sample, params, evaluation=evaluation)
        call = _CALL.search(sample.response)
        if sample.status is not SampleStatus.COMPLETED or call is None:
            break
        told = f"<result>{calculate(call[1])}</result>"
        token_ids = tokenizer(told, add_special_tokens=False)["input_ids"]
        sample.append_response_tokens(args, tokens=token_ids, trainable=False, text=told)
    return sample


def calculate(expression: str) -> str:
    """The value of a sum, difference or product of whole numbers, or "error"."""
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**12:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not a sum, difference or product of whole numbers")


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 for the right result at the end, and a little for calling the tool at all."""
    words = sample.response.removesuffix("<|im_end|>").rstrip()
    return float(words.endswith(str(sample.label))) + 0.1 * ("<result>" in words)
