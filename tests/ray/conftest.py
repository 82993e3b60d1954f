"""A small Ray, shared by the tests that need one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray in this machine, with two GPUs that it takes our word for; its workers import what this process can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        resources = {"num_cpus": 2, "num_gpus": 2}
        ray.init(address="local", **resources, include_dashboard=False, logging_level="warning", log_to_driver=False)
    yield
    ray.shutdown()
