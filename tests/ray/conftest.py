"""A small Ray, shared by the tests that need one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray in this machine, for actors that take no slots; its workers import what this process can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="warning", log_to_driver=False)
    yield
    ray.shutdown()
