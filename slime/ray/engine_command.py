"""The command lines of the processes that the fleet starts."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from typing import Literal

from slime.arguments import Args, check_embedded_size
from slime.backends.sglang_utils.arguments import find_sglang, overridden, tensor_parallel_size
from slime.backends.sglang_utils.command import sglang_commands
from slime.config.served_models import ServerGroup
from slime.engine.client import EngineClient
from slime.engine.spec import HOST, PORT, EngineCommand, EngineSpec

logger = logging.getLogger(__name__)

# The router spreads a prompt's samples over engines once one has this many requests more than another.
ROUTER_DEFAULTS = {"--balance-abs-threshold": "10", "--balance-rel-threshold": "1.2", "--log-level": "warn"}


def resolve_engine(args: Args, device: str) -> Args:
    """`args` with a --rollout-engine that is not auto, now that the device is known. Raises ConfigError."""
    if args.rollout_engine == "auto":
        is_sglang = device == "cuda" and find_sglang(args.sglang_python) is not None
        args = dataclasses.replace(args, rollout_engine="sglang" if is_sglang else "embedded")
        logger.info("--rollout-engine auto: %s", args.rollout_engine)
    if args.rollout_engine == "embedded":
        check_embedded_size(args)
    return args


def transport_kind(args: Args, device: str) -> Literal["disk", "tensor", "distributed"]:
    """How weights reach the engines. device: the trainers', "cuda" or "cpu". Raises ValueError."""
    kind = args.update_weight_transport
    assert kind != "nccl", "settings are resolved"
    if kind == "tensor" and device != "cuda":
        raise ValueError("--update-weight-transport tensor shares memory of GPUs, and there is none: use disk")
    if kind != "auto":
        return kind
    if device != "cuda" or args.rollout_engine != "sglang" or args.rollout_external_engine_addrs is not None:
        return "disk"
    if args.colocate:
        all_share = not args.has_critic_slots  # else some engine has no trainer of the policy on its GPU
        return "tensor" if all_share and args.policy_engine_size == 1 else "disk"
    return "distributed" if all(_has_one_stage(args, group) for group in args.policy.groups) else "disk"


def _has_one_stage(args: Args, group: ServerGroup) -> bool:
    """Whether engines of a group are split by tensors alone."""
    size = group.num_gpus_per_engine
    return tensor_parallel_size(overridden(args.sglang_args, group.overrides), size) == size


def engine_commands(args: Args, spec: EngineSpec) -> list[EngineCommand]:
    """The processes of one engine, one per node; the first listens. Places such as `{port}` are filled in there."""
    return _COMMANDS[args.rollout_engine](args, spec)


def engine_client(args: Args, url: str) -> EngineClient:
    """The client of an engine of this run."""
    is_embedded = args.rollout_engine == "embedded" and args.rollout_external_engine_addrs is None
    return EngineClient(url, args.sglang_api_key, is_sglang=not is_embedded)


def _embedded(args: Args, spec: EngineSpec) -> list[EngineCommand]:
    settings = {
        "--model-path": spec.model_path,
        "--weight-version": spec.weight_version,
        "--host": HOST,
        "--port": PORT,
        "--device": spec.device,
        "--num-threads": str(spec.num_threads),
        "--random-seed": str(args.rollout_seed),
    }
    if args.rollout_max_context_len is not None and not spec.is_frozen:
        settings["--context-length"] = str(args.rollout_max_context_len)
    if args.sglang_api_key is not None:
        settings["--api-key"] = args.sglang_api_key
    flags = [part for item in settings.items() for part in item]
    flags += ["--trust-remote-code"] if args.trust_remote_code else []
    flags += ["--enable-return-routed-experts"] if args.use_rollout_routing_replay and not spec.is_frozen else []
    user_flags = overridden(args.sglang_args, spec.overrides)
    command = [sys.executable, "-m", "slime.engine.embedded.server", *flags, *_known_to_embedded(user_flags)]
    return [EngineCommand(command, {})]


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


_COMMANDS: dict[str, Callable[[Args, EngineSpec], list[EngineCommand]]] = {
    "embedded": _embedded,
    "sglang": sglang_commands,
}


def router_command(args: Args, *, host: str, port: int, metrics_port: int, is_disaggregated: bool) -> list[str]:
    """Command of a router; flags given as --router-X win over slime's defaults.

    is_disaggregated: its engines compute prompts or decode.
    """
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
    flags += ["--pd-disaggregation"] if is_disaggregated else []
    return [sys.executable, "-m", "sglang_router.launch_router", *flags, *args.router_args]
