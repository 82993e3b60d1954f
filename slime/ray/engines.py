"""The engines of a run: what each serves, its slots, and the actors that own its processes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from ray.actor import ActorHandle

from slime.arguments import Args
from slime.config.served_models import ServedModel, ServerGroup, groups_of
from slime.engine.spec import Role
from slime.ray.placement import Slots


@dataclass
class Engine:
    """One engine: its bundles node by node, the actor that owns its process on each, and where it listens now.

    lock: held while it is replaced or registered. is_lost: known to be gone, and not replaced yet. environments: of
    each node's process, once known.
    """

    index: int
    model: ServedModel
    group: ServerGroup
    nodes: list[list[int]] = field(default_factory=list)
    hosts: list[ActorHandle] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    bootstrap_port: int | None = None
    url: str = ""
    num_starts: int = 0
    up_since: float = -math.inf  # on the clock that never goes back
    is_lost: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_external(self) -> bool:
        """Whether somebody else starts and ends it."""
        return not self.hosts

    @property
    def is_frozen(self) -> bool:
        """Whether it keeps the weights that it started with."""
        return not self.model.update_weights

    @property
    def role(self) -> Role:
        """Its part of the work."""
        return cast(Role, self.group.worker_type)

    @property
    def name(self) -> str:
        """What logs call it."""
        if self.is_external:
            return f"the external engine {self.url}"
        return f"{self.model.name}_engine_{self.index}" if self.is_frozen else f"engine_{self.index}"


def create_engines(args: Args, slots: Slots, create_host: Callable[[int], ActorHandle]) -> list[Engine]:
    """The engines of all models, none of them started. create_host: the owner of a process in a bundle."""
    if args.rollout_external_engine_addrs is not None:
        model = args.policy
        urls = [f"http://{address}" for address in args.rollout_external_engine_addrs]
        return [Engine(index, model, model.groups[0], url=url) for index, url in enumerate(urls)]
    places = _places(args, slots)
    return [
        Engine(index, model, group, nodes, [create_host(node[0]) for node in nodes])
        for index, (model, group, nodes) in enumerate(places)
    ]


def _places(args: Args, slots: Slots) -> Iterator[tuple[ServedModel, ServerGroup, list[list[int]]]]:
    """Each engine's model, group and bundles node by node: groups take the slots of engines one after the other."""
    first = 0
    for model, group in groups_of(args.served_models):
        size = group.num_gpus_per_engine
        for start in range(first, first + group.num_engines * size, size):
            yield model, group, slots.by_node(slots.engine_bundles[start : start + size])
        first += group.num_gpus
