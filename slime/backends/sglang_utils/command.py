"""The command line of SGLang for one engine of a run."""

from __future__ import annotations

import sys

from slime.backends.sglang_utils.arguments import overridden, tensor_parallel_size
from slime.config.run import RunConfig
from slime.engine.spec import HEAD, HOST, PORT, EngineCommand, EngineSpec

# /health says that the server answers. By default it generates a token instead: it would wait out a pause, and a cache
# that is to be flushed while it does would end the engine. A scheduler that hangs is ended by SGLang's own watchdog.
# An engine whose scheduler has ended would stay another minute, to let a core dump of its GPU be written.
ENVIRONMENT = {
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "false",
}

# SGLang refuses prompts that leave less than 6 positions of its context, and ends answers 2 before its end.
CONTEXT_MARGIN = 8


def sglang_commands(config: RunConfig, spec: EngineSpec) -> list[EngineCommand]:
    """One process per node of the engine, the first being the one that listens. Raises ConfigError."""
    user_flags = overridden(config.sglang_args, spec.overrides)
    settings = {
        "--model-path": spec.model_path,
        "--host": HOST,
        "--port": PORT,
        "--tp-size": str(tensor_parallel_size(user_flags, spec.num_slots)),
        "--random-seed": str(config.rollout_seed + spec.index),  # with one seed, engines would draw the same
        "--weight-version": spec.weight_version,
    }
    if config.sglang_api_key is not None:
        settings["--api-key"] = config.sglang_api_key
    if spec.device == "cpu":
        settings["--device"] = "cpu"
    flags = [part for item in settings.items() for part in item] + ["--skip-server-warmup"]
    flags += ["--trust-remote-code"] if config.trust_remote_code else []
    flags += ["--enable-return-routed-experts"] if config.use_rollout_routing_replay and not spec.is_frozen else []
    flags += _memory(config, spec)
    if spec.role != "regular":
        flags += ["--disaggregation-mode", spec.role]
    if spec.bootstrap_port is not None:
        flags += ["--disaggregation-bootstrap-port", str(spec.bootstrap_port)]
    python = config.sglang_python or sys.executable
    user_flags += _context(config, spec)
    return [
        EngineCommand(
            [python, "-m", "sglang.launch_server", *flags, *_place(rank, spec.num_nodes), *user_flags],
            _environment(config, spec),
        )
        for rank in range(spec.num_nodes)
    ]


def _memory(config: RunConfig, spec: EngineSpec) -> list[str]:
    """An engine that gives its memory up gets its weights from the trainers afterwards; a frozen one keeps a copy."""
    if not (config.offload_rollout and spec.device == "cuda"):
        return []
    return ["--enable-memory-saver", *(["--enable-weights-cpu-backup"] if spec.is_frozen else [])]


def _context(config: RunConfig, spec: EngineSpec) -> list[str]:
    """A context in which all of ours can be used; it wins over --sglang-context-length, which ours follows from."""
    context = None if spec.is_frozen else config.rollout_max_context_len
    return [] if context is None else ["--context-length", str(context + CONTEXT_MARGIN)]


def _place(rank: int, num_nodes: int) -> list[str]:
    """This process among those of an engine on several nodes."""
    if num_nodes == 1:
        return []
    return ["--nnodes", str(num_nodes), "--node-rank", str(rank), "--dist-init-addr", HEAD]


def _environment(config: RunConfig, spec: EngineSpec) -> dict[str, str]:
    environment = dict(ENVIRONMENT)
    if config.sglang_python not in (None, sys.executable):
        environment["PYTHONPATH"] = ""  # ours would bring our packages into an interpreter that has its own
    if spec.device == "cpu":
        environment["OMP_NUM_THREADS"] = str(spec.num_threads)
    if _context(config, spec):
        environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    return environment
