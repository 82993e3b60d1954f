"""Runs on a GPU: SGLang and FSDP2 share it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cpu.helpers.runs import Run, Starter
from tests.helpers.tiny_models import make_tiny_model


class GPUStarter(Starter):
    """Starts runs of SGLang and FSDP2; SLIME_TEST_FLAGS are flags that the SGLang of this machine needs."""

    def default_flags(self, name: str) -> list[str]:
        """Those of the CPU runs, on a GPU, with room for an engine that starts slowly."""
        own = "--device cuda --rollout-engine sglang --engine-start-timeout-s 300 --rollout-health-check-interval 2"
        return [*super().default_flags(name), *own.split(), *os.environ.get("SLIME_TEST_FLAGS", "").split()]


@pytest.fixture(scope="session")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 whose heads the kernels take."""
    path = tmp_path_factory.mktemp("model")
    return make_tiny_model(path, architecture="qwen3", hidden_size=256, head_dim=64, initializer_range=0.02)


@pytest.fixture
def start(tmp_path: Path, gpu_model: Path) -> Iterator[Starter]:
    """Starts runs; whatever is left of them ends with the test."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{n}+{n + 1}=", "label": str(2 * n + 1)} for n in range(40)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tempfile.TemporaryDirectory(prefix="slime-test-", dir="/dev/shm") as weights_root:
        starter = GPUStarter(tmp_path, gpu_model, prompts, Path(weights_root))
        yield starter
        starter.end()


__all__ = ["Run", "Starter", "gpu_model", "start"]
