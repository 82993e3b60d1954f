"""Which engine a run has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slime.arguments import Args
from slime.config import ConfigError
from slime.config.served_models import ServedModel, ServerGroup
from slime.engine.spec import EngineSpec
from slime.ray.engine_command import engine_client, engine_commands, resolve_engine, transport_kind

ARGS = Args(train_backend="fsdp")


@pytest.fixture
def python_with_sglang(tmp_path: Path) -> str:
    """An interpreter that finds a package of that name."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /opt/sglang/__init__.py\n")
    python.chmod(0o755)
    return str(python)


def test_auto_is_sglang_on_gpus_where_it_is_installed(python_with_sglang: str) -> None:
    args = replace(ARGS, sglang_python=python_with_sglang)
    assert resolve_engine(args, "cuda").rollout_engine == "sglang"
    assert resolve_engine(args, "cpu").rollout_engine == "embedded"
    assert resolve_engine(replace(args, sglang_python="/bin/true"), "cuda").rollout_engine == "embedded"
    assert resolve_engine(replace(args, rollout_engine="sglang"), "cpu").rollout_engine == "sglang"


def test_an_embedded_engine_of_several_slots_is_refused_once_it_is_known_to_be_one(python_with_sglang: str) -> None:
    args = replace(ARGS, sglang_python=python_with_sglang, rollout_num_gpus_per_engine=2)
    assert resolve_engine(args, "cuda").rollout_num_gpus_per_engine == 2
    with pytest.raises(ConfigError, match="the embedded engine serves one slot"):
        resolve_engine(args, "cpu")


def test_so_are_groups_of_a_file_that_the_embedded_engine_cannot_be() -> None:
    args = replace(ARGS, rollout_engine="embedded", hf_checkpoint="/model")
    wide, gap = ServerGroup("regular", 2, 2), ServerGroup("placeholder", 2, 2)
    halves = (ServerGroup("prefill", 1, 1), ServerGroup("decode", 1, 1))
    for groups, message in (
        ((wide,), "--sglang-config: num_gpus_per_engine 2: the embedded engine serves one slot"),
        (halves, "--sglang-config: worker_type prefill needs SGLang"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_engine(replace(args, file_models=(ServedModel("actor", "/model", True, groups),)), "cpu")
    narrow = (ServerGroup("regular", 1, 1), gap)
    assert resolve_engine(replace(args, file_models=(ServedModel("actor", "/model", True, narrow),)), "cpu") is not None


def test_each_kind_of_engine_has_its_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    args = replace(ARGS, hf_checkpoint=str(tmp_path))
    spec = EngineSpec(index=0, model_path="/model", weight_version="1", num_threads=1, device="cpu")
    (embedded,) = engine_commands(replace(args, rollout_engine="embedded"), spec)
    (sglang,) = engine_commands(replace(args, rollout_engine="sglang"), spec)
    assert embedded.argv[2] == "slime.engine.embedded.server"
    assert sglang.argv[2] == "sglang.launch_server"


def test_an_engine_of_somebody_else_is_spoken_to_as_sglang() -> None:
    embedded = replace(ARGS, rollout_engine="embedded")
    assert not engine_client(embedded, "http://a:1").is_sglang
    assert engine_client(replace(embedded, rollout_engine="sglang"), "http://a:1").is_sglang
    assert engine_client(replace(embedded, rollout_external_engine_addrs=["a:1"]), "http://a:1").is_sglang


ON_GPUS = replace(ARGS, rollout_engine="sglang", rollout_num_gpus_per_engine=2)


@pytest.mark.parametrize(
    ("args", "device", "kind"),
    [
        (ON_GPUS, "cuda", "distributed"),
        (ON_GPUS, "cpu", "disk"),
        (replace(ON_GPUS, rollout_engine="embedded"), "cuda", "disk"),
        (replace(ON_GPUS, rollout_external_engine_addrs=["10.0.0.1:30000"]), "cuda", "disk"),
        (replace(ON_GPUS, sglang_args=["--pp-size", "2"]), "cuda", "disk"),
        (replace(ON_GPUS, colocate=True, rollout_num_gpus_per_engine=1), "cuda", "tensor"),
        (replace(ON_GPUS, colocate=True), "cuda", "disk"),
        (replace(ON_GPUS, colocate=True, rollout_num_gpus_per_engine=1, critic_num_nodes=1), "cuda", "disk"),
        (replace(ARGS, update_weight_transport="distributed"), "cpu", "distributed"),
        (replace(ON_GPUS, update_weight_transport="disk"), "cuda", "disk"),
    ],
)
def test_weights_take_the_fastest_way_that_there_is_unless_one_is_named(args: Args, device: str, kind: str) -> None:
    assert transport_kind(args, device) == kind


def test_memory_of_gpus_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="shares memory of GPUs, and there is none: use disk"):
        transport_kind(replace(ARGS, update_weight_transport="tensor"), "cpu")
