"""--rm-type ifbench: 1 if the response follows every instruction of metadata["instruction_id_list"], else 0.

metadata["kwargs"] holds the arguments of each, in the same order, as the data sets of IFEval and IFBench have them.
The instructions of IFEval are checked here (`ifeval.py`); all others by the registry of IFBench (arXiv:2507.02833), of
which a checkout (github.com/allenai/IFBench) with what it requires must then be on PYTHONPATH.
"""

from __future__ import annotations

import importlib
from typing import Any

from slime.rollout.rm_hub.custom import call_function
from slime.rollout.rm_hub.errors import RewardError
from slime.rollout.rm_hub.ifeval import CHECKS, follows
from slime.utils.types import Sample

REGISTRY = "instructions_registry"  # the module of an IFBench checkout


async def ifbench_reward(args: Any, sample: Sample) -> float:
    """1.0 or 0.0. Raises RewardError where the metadata names no instructions, or one that is not known."""
    for instruction, arguments in _instructions(sample):
        if instruction in CHECKS:
            try:
                followed = follows(instruction, sample.response, arguments)
            except ValueError as error:
                raise RewardError("ifbench", sample.index, str(error)) from error
        else:
            check = f"{__name__}.follows_registry"
            prompt = sample.metadata.get("prompt", sample.prompt)
            followed = await call_function(
                args, sample.index, check, instruction, sample.response, arguments, prompt=prompt
            )
        if not followed:
            return 0.0
    return 1.0


def follows_registry(instruction: str, response: str, arguments: dict[str, Any], *, prompt: Any) -> bool:
    """Whether `response` follows an instruction as the registry of IFBench checks it.

    Raises ValueError where there is no registry or it does not know the instruction.
    """
    try:
        known = importlib.import_module(REGISTRY).INSTRUCTION_DICT
    except ModuleNotFoundError as error:
        raise ValueError(
            f"instruction {instruction!r} is none of IFEval's, and {error.name} of IFBench does not import: put a "
            "checkout of github.com/allenai/IFBench on PYTHONPATH"
        ) from error
    if instruction not in known:
        raise ValueError(f"neither IFEval nor the IFBench on PYTHONPATH knows the instruction {instruction!r}")
    checker = known[instruction](instruction)
    checker.build_description(**{key: value for key, value in arguments.items() if value is not None})
    if "prompt" in (checker.get_instruction_args() or {}):
        checker.build_description(prompt=prompt)
    return bool(response.strip()) and bool(checker.check_following(response))


def _instructions(sample: Sample) -> list[tuple[str, dict[str, Any]]]:
    names = sample.metadata.get("instruction_id_list")
    if not isinstance(names, list) or not names:
        raise RewardError("ifbench", sample.index, "metadata['instruction_id_list'] must be a list of instructions")
    arguments = sample.metadata.get("kwargs") or [{}] * len(names)
    if len(arguments) != len(names):
        reason = f"{len(names)} instructions but {len(arguments)} entries of metadata['kwargs']"
        raise RewardError("ifbench", sample.index, reason)
    return [(name, entry or {}) for name, entry in zip(names, arguments, strict=True)]
