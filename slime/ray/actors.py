"""Ray actors from plain classes, which tests use as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

# Calls of these concurrency groups run beside other methods: short ones, and the one that ends with the process.
CONTROL = "control"
LIFETIME = "lifetime"


def create_actor(cls: type, *args: Any, options: Mapping[str, Any] | None = None) -> ActorHandle:
    """An actor of `cls(*args)`; it takes no CPU slot unless `options` say so."""
    settings: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {CONTROL: 1, LIFETIME: 1}} | dict(options or {})
    decorator: Any = ray.remote(**settings)
    handle: ActorHandle = decorator(cls).remote(*args)
    return handle
