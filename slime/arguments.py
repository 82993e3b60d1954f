"""The flags of a run: every group of slime.config and each backend's own, as one flat, frozen `Args`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime.backends.fsdp_utils.arguments import FSDPConfig, check_context_parallel, check_packable
from slime.backends.megatron_utils.arguments import MegatronConfig, check_megatron
from slime.backends.megatron_utils.extra_args import ExtraArgsProvider, documented_provider, own_settings
from slime.backends.megatron_utils.find import find_megatron, has_training
from slime.backends.megatron_utils.stages import num_virtual_stages
from slime.backends.sglang_utils.arguments import (
    check_flags,
    find_sglang,
    known_flags,
    overridden,
    tensor_parallel_size,
    value_of,
)
from slime.config.base import ConfigError, Group, flag_of
from slime.config.flags import as_tokens, build_parser, check_value, read_config_file, settings_of, unknown_flag_error
from slime.config.model import check_model_directory, context_length, read_model_config
from slime.config.run import GROUPS, RunConfig
from slime.config.served_models import groups_of
from slime.config.validate import resolve, with_context

ALL_GROUPS: tuple[type[Group], ...] = (*GROUPS, FSDPConfig, MegatronConfig)
SECRETS = frozenset({"wandb_key", "sglang_api_key"})  # never written down or sent to a tracker
DERIVED = frozenset({"file_models", "sglang_model_routers"})  # what --sglang-config says, where the routers are
PASS_THROUGH = {"--sglang-": "sglang_args", "--router-": "router_args"}


@dataclass(frozen=True, kw_only=True)
class Args(RunConfig, FSDPConfig, MegatronConfig):
    """All settings of one run. Plug-ins receive it; core code asks for the narrow group it needs."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @property
    def num_data_ranks(self) -> int:
        """Shares in which the actor's ranks split the samples of a step."""
        is_megatron = self.train_backend == "megatron"
        return super().num_data_ranks // (self.model_parallel_size if is_megatron else 1)

    if not TYPE_CHECKING:  # for plug-ins; to a type checker a name that no group declares is an error

        def __getattr__(self, name: str) -> Any:
            for own in (self.__dict__.get("plugin_settings", {}), self.__dict__.get("megatron_args", {})):
                if name in own:
                    return own[name]
            raise AttributeError(f"there is no setting {name!r}, and none of --plugin-settings")


def parse_args(argv: Sequence[str] | None = None, *, extra_args_provider: ExtraArgsProvider | None = None) -> Args:
    """Settings from --custom-config-path (over flags, over --config, over defaults), resolved and checked.

    extra_args_provider: adds flags of the user's own, whose values `args` then has; with the Megatron backend that of
    the module `pretrain_gpt` counts where it has one and none is given here.

    Raises ConfigError with one sentence where a flag is unknown, ill-typed or contradicts another.
    """
    tokens, passed_on = _split_pass_through(list(sys.argv[1:] if argv is None else argv))
    parser = build_parser(ALL_GROUPS, prog="slime train", description="Post-train a language model with RL.")
    namespace, unknown = parser.parse_known_args(tokens)
    given = vars(namespace)
    values = _from_file(given.pop("config")) if "config" in given else {}
    values |= given
    own, unknown = _own_settings(unknown, values, extra_args_provider)
    fields, others = _of_megatron(unknown, values) if unknown else ({}, {})
    values["megatron_args"] = fields | values.get("megatron_args", {})
    values["plugin_settings"] = own | others | values.get("plugin_settings", {})
    for name, extra in passed_on.items():
        values[name] = values.get(name, []) + extra
    stated = Args(**values)
    if stated.custom_config_path is not None:
        stated = dataclasses.replace(stated, **_from_custom_file(stated.custom_config_path, stated.plugin_settings))
    args = resolve(stated)
    _check_supported(args)
    longest = _engine_context(args)
    return args if longest is None else with_context(args, longest)


def _own_settings(
    words: list[str], values: dict[str, Any], provider: ExtraArgsProvider | None
) -> tuple[dict[str, Any], list[str]]:
    """The settings of the user's own flags, and the words that are none of these."""
    if provider is None and values.get("train_backend", "megatron") == "megatron":
        with contextlib.suppress(ConfigError):  # it is needed, or not, in its own place
            find_megatron()
        provider = documented_provider()
    return ({}, words) if provider is None else own_settings(words, provider, _known_names())


def _of_megatron(words: list[str], values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that `words`, of no group, make: fields of Megatron's configurations, and others for plug-ins to read.

    Raises ConfigError where they mean nothing.
    """
    name = words[0].partition("=")[0]
    if not name.startswith("--"):
        raise ConfigError(f"Unexpected argument {name!r}: settings are given as --flag value.")
    near = difflib.get_close_matches(name, _known_flags(), n=1, cutoff=0.85)
    if values.get("train_backend") == "fsdp" or "hf_checkpoint" not in values or (near and not has_training()):
        raise unknown_flag_error(name, _known_flags())
    from slime.backends.megatron_utils.flags import further_settings

    return further_settings(words, find_megatron(), values["hf_checkpoint"], _known_flags())


def _known_names() -> list[str]:
    return [setting.name for group in ALL_GROUPS for setting in settings_of(group)]


def _known_flags() -> list[str]:
    return [flag for group in ALL_GROUPS for setting in settings_of(group) for flag in setting.flags] + ["--config"]


def _split_pass_through(tokens: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate --sglang-X and --router-X flags, with their values, from slime's own."""
    known = set(_known_flags())
    own: list[str] = []
    passed_on: dict[str, list[str]] = {}
    target = own
    for token in tokens:
        if token.startswith("--"):
            name = token.partition("=")[0]
            prefix = next((p for p in PASS_THROUGH if name.startswith(p)), None)
            if prefix is None or name in known:
                target = own
            else:
                target = passed_on.setdefault(PASS_THROUGH[prefix], [])
                token = "--" + token.removeprefix(prefix)
        target.append(token)
    return own, passed_on


def _from_file(path: str) -> dict[str, Any]:
    settings = {setting.name: setting for group in ALL_GROUPS for setting in settings_of(group)}
    values: dict[str, Any] = {}
    for key, value in read_config_file(path).items():
        prefix = next((p for p in PASS_THROUGH if flag_of(key).startswith(p) and key not in settings), None)
        if key in settings:
            values[key] = check_value(settings[key], value, source=f"--config {path}")
        elif prefix is not None:
            flag = "--" + flag_of(key).removeprefix(prefix)
            values.setdefault(PASS_THROUGH[prefix], []).extend(as_tokens(flag, value))
        else:
            raise ConfigError(f"--config {path}: {unknown_flag_error(key, settings)}")
    return values


def _from_custom_file(path: str, plugin_settings: dict[str, Any]) -> dict[str, Any]:
    """What --custom-config-path says, with keys that are no settings among `plugin_settings`."""
    settings = {setting.name: setting for group in ALL_GROUPS for setting in settings_of(group)}
    read = read_config_file(path, "--custom-config-path")
    values = {
        key: check_value(settings[key], value, source=f"--custom-config-path {path}")
        for key, value in read.items()
        if key in settings
    }
    own = {key: value for key, value in read.items() if key not in settings}
    return {**values, "plugin_settings": {**plugin_settings, **values.get("plugin_settings", {}), **own}}


def _check_supported(args: Args) -> None:
    if args.train_backend == "megatron" and not args.debug_rollout_only:
        _check_none_of_fsdp(args)
        check_megatron(args, args)
    if not args.debug_train_only:
        _check_engine(args)
    _check_router_args(args.router_args)
    check_model_directory(args.hf_checkpoint, "--hf-checkpoint")
    model_config = read_model_config(args.hf_checkpoint)
    if args.train_backend == "megatron" and not args.debug_rollout_only and "num_hidden_layers" in model_config:
        num_virtual_stages(args, model_config["num_hidden_layers"])
    if args.train_backend == "fsdp":
        if args.optimizer_cpu_offload:
            raise ConfigError("--optimizer-cpu-offload is of Megatron: --train-backend fsdp has --fsdp-cpu-offload.")
        check_packable(model_config)
        check_context_parallel(args.context_parallel_size, args, model_config)
    for model in args.file_models:
        check_model_directory(model.model_path, f"--sglang-config: the model_path of {model.name}")
    if args.ref_load is not None and not Path(args.ref_load).is_dir():
        raise ConfigError(f"--ref-load: there is no directory {args.ref_load}.")


def _check_none_of_fsdp(args: Args) -> None:
    """What would have no effect with Megatron, and memory run out for it."""
    for is_given, what in (
        (args.fsdp_cpu_offload, "--fsdp-cpu-offload is of FSDP: --train-backend megatron has --optimizer-cpu-offload."),
        (args.gradient_checkpointing, "--gradient-checkpointing is of FSDP: Megatron has --recompute-granularity."),
    ):
        if is_given:
            raise ConfigError(what)


def _check_engine(args: Args) -> None:
    """Refuse what the engine of this run cannot do, as far as that is known before the devices are."""
    is_auto, is_sglang = args.rollout_engine == "auto", args.rollout_engine == "sglang"
    package = find_sglang(args.sglang_python) if is_sglang or (is_auto and args.device != "cpu") else None
    if is_sglang and package is None and _starts_engines_here(args):
        python = args.sglang_python or sys.executable
        raise ConfigError(f"--rollout-engine sglang: {python} has no sglang: install it, or give --sglang-python.")
    if package is None and not is_sglang:
        check_embedded_size(args)
    flags = [*(() if is_sglang else _embedded_flags()), *(known_flags(package) if package else ())]
    check_flags(args.sglang_args, flags, is_complete=package is not None)
    if not args.file_models:
        tensor_parallel_size(args.sglang_args, args.rollout_num_gpus_per_engine)
    for model, group in groups_of(args.file_models):
        try:
            check_flags(list(map(flag_of, group.overrides)), flags, is_complete=package is not None)
            tensor_parallel_size(overridden(args.sglang_args, group.overrides), group.num_gpus_per_engine)
        except ConfigError as error:
            raise ConfigError(f"--sglang-config: {args.sglang_config}: {model.name}: {error}") from error


def check_embedded_size(args: Args) -> None:
    """Raise ConfigError where the embedded engine, which serves one slot, would have several, or a part of the work."""
    if any(model.is_disaggregated for model in args.served_models):
        flag = "--sglang-config: worker_type prefill" if args.file_models else "--prefill-num-servers"
        raise ConfigError(f"{flag} needs SGLang: give --rollout-engine sglang.")
    groups = [group for _, group in groups_of(args.file_models) if group.num_engines]
    size = max((group.num_gpus_per_engine for group in groups), default=args.rollout_num_gpus_per_engine)
    if size > 1:
        flag = "--sglang-config: num_gpus_per_engine" if args.file_models else "--rollout-num-gpus-per-engine"
        raise ConfigError(
            f"{flag} {size}: the embedded engine serves one slot. Use 1 (more slots make more engines), or "
            "--rollout-engine sglang."
        )


def _starts_engines_here(args: Args) -> bool:
    """Whether engines are started in this machine, not on another node or by somebody else."""
    return "RAY_ADDRESS" not in os.environ and args.rollout_external_engine_addrs is None


def _embedded_flags() -> list[str]:
    from slime.engine.embedded.args import ServerArgs

    return [flag_of(item.name) for item in dataclasses.fields(ServerArgs)]


def _engine_context(args: Args) -> int | None:
    """Tokens of prompt and response that an engine takes: --sglang-context-length, else what the model was made for.

    SGLang goes beyond the latter when told to.
    """
    model_context = context_length(read_model_config(args.hf_checkpoint))
    given = value_of(args.sglang_args, "--context-length")
    if given is None:
        return model_context
    if not given.isdecimal() or int(given) == 0:
        raise ConfigError(f"--sglang-context-length must be above 0, got {given!r}.")
    if model_context is None or args.rollout_engine == "sglang":
        return int(given)
    return min(int(given), model_context)


def _check_router_args(tokens: list[str]) -> None:
    """Check flags of the router against the router that is installed."""
    if not tokens:
        return
    from sglang_router.router_args import RouterArgs

    from slime.config.flags import FlagParser

    parser = FlagParser(prog="slime train", allow_abbrev=False, add_help=False)
    RouterArgs.add_cli_args(parser, use_router_prefix=False, exclude_host_port=True)
    try:
        _, unknown = parser.parse_known_args(tokens)
        if unknown:
            known = [flag for action in parser._actions for flag in action.option_strings]
            raise unknown_flag_error(unknown[0].partition("=")[0], known)
    except ConfigError as error:
        message = str(error).replace("`slime train --help`", "Its own help")
        raise ConfigError(message.replace("--", "--router-")) from error


def settings_as_dict(args: Args) -> dict[str, Any]:
    """All settings by name, as a config file would hold them, keys and passwords left out."""
    return {name: value for name, value in dataclasses.asdict(args).items() if name not in SECRETS | DERIVED}
