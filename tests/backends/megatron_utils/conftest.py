"""Megatron on the CPU, for every test of this folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from helpers.megatron_cpu import megatron_on_cpu

from slime.backends.megatron_utils.find import find_megatron
from slime.config.base import ConfigError
from slime.utils.processes import raise_open_file_limit


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    find_megatron()  # in MEGATRON_PATH, if that is set, from here on
    raise_open_file_limit()  # each backend of a test opens process groups, and each of those sockets
    with megatron_on_cpu():
        yield
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
    gc.collect()


def pytest_report_header() -> str:
    """Which Megatron the tests of this folder have."""
    try:
        return f"megatron: {find_megatron()}"
    except ConfigError as error:
        return f"megatron: {error}"
