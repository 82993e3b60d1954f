"""The command lines of the processes that the fleet starts."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

from slime.arguments import Args

logger = logging.getLogger(__name__)

# The router spreads a prompt's samples over engines once one has this many requests more than another.
ROUTER_DEFAULTS = {"--balance-abs-threshold": "10", "--balance-rel-threshold": "1.2", "--log-level": "warn"}


@dataclass(frozen=True)
class EngineSpec:
    """What one engine process is to serve."""

    model_path: str
    weight_version: str
    num_threads: int
    device: str


def engine_command(args: Args, spec: EngineSpec) -> list[str]:
    """Command of one engine, with `{host}` and `{port}` to be filled in where it runs."""
    return _COMMANDS[_engine_kind(args)](args, spec)


def _engine_kind(args: Args) -> str:
    return "embedded" if args.rollout_engine == "auto" else args.rollout_engine


def _embedded(args: Args, spec: EngineSpec) -> list[str]:
    command = [sys.executable, "-m", "slime.engine.embedded.server"]
    settings = {
        "--model-path": spec.model_path,
        "--weight-version": spec.weight_version,
        "--host": "{host}",
        "--port": "{port}",
        "--device": spec.device,
        "--num-threads": str(spec.num_threads),
        "--random-seed": str(args.rollout_seed),
    }
    if args.rollout_max_context_len is not None:
        settings["--context-length"] = str(args.rollout_max_context_len)
    if args.sglang_api_key is not None:
        settings["--api-key"] = args.sglang_api_key
    flags = [part for item in settings.items() for part in item]
    flags += ["--trust-remote-code"] if args.trust_remote_code else []
    return command + flags + _known_to_embedded(args.sglang_args)


def _known_to_embedded(tokens: list[str]) -> list[str]:
    """The --sglang-X flags that the embedded engine has too; the rest are named in a warning."""
    from slime.engine.embedded.args import ServerArgs

    known = {"--" + item.name.replace("_", "-") for item in dataclasses.fields(ServerArgs)}
    kept: list[str] = []
    ignored: list[str] = []
    target = kept
    for token in tokens:
        if token.startswith("--"):
            target = kept if token.partition("=")[0] in known else ignored
        target.append(token)
    if ignored:
        names = ", ".join("--sglang-" + token[2:] for token in ignored if token.startswith("--"))
        logger.warning("the embedded engine ignores %s", names)
    return kept


_COMMANDS: dict[str, Callable[[Args, EngineSpec], list[str]]] = {"embedded": _embedded}


def router_command(args: Args, *, host: str, port: int, metrics_port: int) -> list[str]:
    """Command of the router; flags given as --router-X win over slime's defaults."""
    settings = {
        "--host": host,
        "--port": str(port),
        "--prometheus-host": host,
        "--prometheus-port": str(metrics_port),
        "--request-timeout-secs": str(args.sglang_router_request_timeout_secs),
        **ROUTER_DEFAULTS,
    }
    given = {token.partition("=")[0] for token in args.router_args if token.startswith("--")}
    flags = [part for name, value in settings.items() if name not in given for part in (name, value)]
    return [sys.executable, "-m", "sglang_router.launch_router", *flags, *args.router_args]
