"""Ray actors from plain classes, which tests use as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

# Calls of this concurrency group are answered while another method runs.
CONTROL = "control"


def create_actor(cls: type, *args: Any, options: Mapping[str, Any] | None = None) -> ActorHandle:
    """An actor of `cls(*args)`; it takes no CPU slot unless `options` say so."""
    settings: dict[str, Any] = {"num_cpus": 0, "concurrency_groups": {CONTROL: 1}} | dict(options or {})
    decorator: Any = ray.remote(**settings)
    handle: ActorHandle = decorator(cls).remote(*args)
    return handle
