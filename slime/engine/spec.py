"""What one engine process is to be, and the command that makes it so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Role = Literal["regular", "prefill", "decode"]

# Filled in where the process starts: its node's address, a free port there, address:port of the engine's first node.
HOST, PORT, HEAD = "{host}", "{port}", "{head}"


@dataclass(frozen=True)
class EngineSpec:
    """What one engine is to serve, and with what. index: its place among the engines. num_slots: on all its nodes.

    bootstrap_port: where a prefill engine meets those that decode. is_frozen: it keeps the weights of model_path,
    and its own context. overrides: settings of the engine by name, which win over those of all engines.
    """

    index: int
    model_path: str
    weight_version: str
    num_threads: int
    device: str
    num_slots: int = 1
    num_nodes: int = 1
    role: Role = "regular"
    bootstrap_port: int | None = None
    is_frozen: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


class EngineCommand(NamedTuple):
    """The process of an engine on one node. env: what differs from the environment of whoever starts it."""

    argv: list[str]
    env: dict[str, str]
