"""The flags of SGLang: which exist, which are slime's to set, and what they say together."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from slime.config.base import ConfigError, flag_of
from slime.config.flags import as_tokens

# Flags that slime sets, with the setting to use instead.
FLAGS_SET_BY_SLIME = {
    "--model-path": "--hf-checkpoint",
    "--model": "--hf-checkpoint",
    "--tp-size": "--rollout-num-gpus-per-engine",
    "--tp": "--rollout-num-gpus-per-engine",
    "--tensor-parallel-size": "--rollout-num-gpus-per-engine",
    "--random-seed": "--rollout-seed",
    "--trust-remote-code": "--trust-remote-code",
    "--device": "--device",
    "--disaggregation-mode": "--prefill-num-servers",
    "--disaggregation-bootstrap-port": None,
    "--config": "--sglang-config, --sglang-X flags, or keys of the --config file",
    "--enable-return-routed-experts": "--use-rollout-routing-replay",
    "--weight-version": None,
    "--host": None,
    "--port": None,
    "--nnodes": None,
    "--node-rank": None,
    "--dist-init-addr": None,
    "--nccl-init-addr": None,
    "--base-gpu-id": None,
    "--gpu-id-step": None,
    "--nccl-port": None,
    "--use-ray": None,
}
NEARLY_THE_SAME = 0.87  # similarity from which a flag that nobody can look up counts as misspelt
_FIND = "import importlib.util as u; s = u.find_spec('sglang'); print(s.origin if s else '')"
_FIND_DEADLINE_S = 30.0


@cache
def find_sglang(python: str | None) -> Path | None:
    """The folder of the package `sglang` that `python` (None: this interpreter) imports; None where it has none."""
    if python is None or python == sys.executable:
        spec = importlib.util.find_spec("sglang")
        origin = spec.origin if spec else None
    else:
        origin = _ask_for_sglang(python)
    return Path(origin).parent if origin else None


def _ask_for_sglang(python: str) -> str:
    """Where `python` finds sglang; empty where it does not. Raises ConfigError where `python` cannot be run."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        answer = subprocess.run(
            [python, "-c", _FIND], capture_output=True, text=True, timeout=_FIND_DEADLINE_S, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--sglang-python {python} cannot be run: {error}") from error
    return answer.stdout.strip()


@cache
def known_flags(package: Path) -> frozenset[str]:
    """Every flag of `ServerArgs`, read off its source: importing it takes 5 to 40 s. A few names beside them are none.

    Fields of its classes are flags, and strings that begin with `--` are their other names.
    """
    names: set[str] = set()
    for file in (package / "srt" / "server_args.py", *(package / "srt" / "arg_groups").rglob("*.py")):
        names.update(_names_in(file))
    return frozenset(names | {"--no-" + name[2:] for name in names})


def _names_in(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield "--" + node.target.id.replace("_", "-")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
            yield node.value


def check_flags(tokens: list[str], known: Iterable[str], *, is_complete: bool) -> None:
    """Refuse flags that slime sets, and misspelt ones. Raises ConfigError with the flag to use.

    known: flags of the engine. is_complete: there are no others; else one that is not among them passes unless it
    nearly is.
    """
    known = set(known)
    for name in (token.partition("=")[0] for token in tokens if token.startswith("--")):
        if name in FLAGS_SET_BY_SLIME:
            instead = FLAGS_SET_BY_SLIME[name]
            raise ConfigError(f"--sglang-{name[2:]} is set by slime: {f'use {instead}' if instead else 'drop it'}.")
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if is_complete else NEARLY_THE_SAME)
        if near:
            raise ConfigError(f"Unknown setting --sglang-{name[2:]}. Did you mean --sglang-{near[0][2:]}?")
        if is_complete:
            raise ConfigError(f"Unknown setting --sglang-{name[2:]}: the SGLang that is installed has no {name}.")


def overridden(tokens: list[str], overrides: Mapping[str, Any]) -> list[str]:
    """`tokens`, such as `--flag value`, with `overrides` in place of their own; one that is off is left out.

    overrides: by name, as `mem_fraction_static`.
    """
    flags = {flag_of(name) for name in overrides}
    kept: list[str] = []
    is_kept = True
    for token in tokens:
        if token.startswith("--"):
            is_kept = token.partition("=")[0] not in flags
        kept += [token] if is_kept else []
    return kept + [part for name, value in overrides.items() for part in as_tokens(flag_of(name), value)]


def value_of(tokens: list[str], *flags: str) -> str | None:
    """The last value of any of `flags` among tokens such as `--flag value` and `--flag=value`; None where none is."""
    value = None
    for token, following in pairwise([*tokens, ""]):
        if token.partition("=")[0] in flags:
            value = token.partition("=")[2] if "=" in token else following
    return value


def size_of(tokens: list[str], *flags: str) -> int:
    """The value of a flag that is a size, 1 where it is not given. Raises ConfigError."""
    value = value_of(tokens, *flags)
    if value is None:
        return 1
    if not value.isdecimal() or int(value) == 0:
        raise ConfigError(f"--sglang-{flags[0][2:]} must be above 0, got {value!r}.")
    return int(value)


def tensor_parallel_size(tokens: list[str], num_slots: int) -> int:
    """Slots of one pipeline stage of an engine of `num_slots`. Raises ConfigError where sizes do not fit together."""
    stages = size_of(tokens, "--pp-size", "--pipeline-parallel-size")
    shares = size_of(tokens, "--dp-size", "--data-parallel-size")
    if num_slots % stages:
        raise ConfigError(f"--sglang-pp-size {stages} must divide --rollout-num-gpus-per-engine {num_slots}.")
    if shares > 1 and "--enable-dp-attention" not in tokens:
        raise ConfigError(
            f"--sglang-dp-size {shares} needs --sglang-enable-dp-attention; for engines that share nothing give more "
            "slots (--rollout-num-gpus)."
        )
    if num_slots // stages % shares:
        raise ConfigError(f"--sglang-dp-size {shares} must divide --rollout-num-gpus-per-engine {num_slots}.")
    return num_slots // stages
