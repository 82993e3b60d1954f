"""Groups of settings <-> flags, files and the reference page."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import yaml

from slime.config.base import ConfigError, Group, flag_of

_NO_BUFFER = "give a --rollout-function-path that asks your server"
_NO_ROUTER_OF_OURS = "the router is sglang-router"
# Flags that other versions of slime have: what to do here.
INSTEAD = {
    "--use-dynamic-global-batch-size": "drop it: the --num-steps-per-rollout steps share what a rollout brings",
    "--disable-rollout-trim-samples": "drop it: no sample is left out",
    "--rollout-external": "drop it: --rollout-external-engine-addrs says it",
    "--use-distributed-post": "drop it: one asyncio client sends all requests",
    "--http-proxy": "drop it: requests to router and engines go there directly",
    "--model-name": "drop it: config.json of --hf-checkpoint says what the model is",
    "--multimodal-keys": "drop it: prompts are text",
    "--padded-vocab-size": "drop it: vocabularies are padded as far as ranks need",
    "--data-pad-size-multiplier": "drop it: packs are padded as far as ranks need",
    "--qkv-format": "drop it: sequences are packed (thd)",
    "--megatron-to-hf-mode": "drop it: names of tensors are slime's own tables",
    "--recompute-loss-function": "drop it: logits are computed by --log-probs-chunk-size, again in the backward",
    "--memory-recorder": "drop it: --record-memory-history is torch's recorder",
    "--train-memory-margin-bytes": "drop it: a trainer that sleeps gives up what it has",
    "--use-critic": "drop it: --advantage-estimator ppo has a critic",
    "--critic-train-only": "use --num-critic-only-steps",
    "--rollout-buffer-url": _NO_BUFFER,
    "--fetch-trajectory-retry-times": _NO_BUFFER,
    "--min-batch-collection-ratio": _NO_BUFFER,
    "--rollout-task-type": _NO_BUFFER,
    "--use-slime-router": f"drop it: {_NO_ROUTER_OF_OURS}; its flags are --router-X",
    "--slime-router-middleware-paths": f"{_NO_ROUTER_OF_OURS}, which takes no middleware",
    "--slime-router-timeout": f"{_NO_ROUTER_OF_OURS}: use --sglang-router-request-timeout-secs",
    "--slime-router-max-connections": f"{_NO_ROUTER_OF_OURS}: use --router-max-concurrent-requests",
    "--slime-router-health-check-failure-threshold": f"{_NO_ROUTER_OF_OURS}: use --router-health-failure-threshold",
}


class Setting(NamedTuple):
    """One field of a group, with its type taken apart."""

    name: str
    help: str
    default: Any
    kind: type  # int, float, str, bool or dict: of the value, or of a list's items
    is_list: bool
    is_optional: bool
    choices: tuple[str, ...] | None
    alias: str | None
    disable: str | None
    repeats: bool

    @property
    def flags(self) -> list[str]:
        """Every flag that sets it, the first being the one to quote."""
        names = [flag_of(self.name)] + ([self.alias] if self.alias else [])
        if self.kind is bool:
            names += [flag_of("no_" + self.name)] + ([self.disable] if self.disable else [])
        return names


def settings_of(group: type[Group]) -> Iterator[Setting]:
    """The settings that a group itself declares, in order."""
    hints = typing.get_type_hints(group)
    own = inspect.get_annotations(group)
    for item in dataclasses.fields(group):
        if item.name in own:
            yield _setting(item, hints[item.name])


def _setting(item: dataclasses.Field[Any], hint: Any) -> Setting:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # the latter: Literal[...] | None
    has_none = is_union and types.NoneType in typing.get_args(hint)
    if has_none:
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    is_list = typing.get_origin(hint) is list
    if is_list:
        (hint,) = typing.get_args(hint)
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
    kind = str if choices else (typing.get_origin(hint) or hint)
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    meta = item.metadata
    shape = (kind, is_list, has_none, choices)
    return Setting(item.name, meta["help"], default, *shape, meta["alias"], meta["disable"], meta["repeats"])


class FlagParser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:1].upper() + message[1:] + ".")


def build_parser(groups: Iterable[type[Group]], *, prog: str, description: str) -> FlagParser:
    """A parser of all groups' flags. Flags that are not given leave no trace in the namespace."""
    parser = FlagParser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML or TOML file of settings; flags win over it.")
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or group.__name__).splitlines()[0])
        for setting in settings_of(group):
            _add_flags(section, setting)
    return parser


def _add_flags(section: argparse._ArgumentGroup, setting: Setting) -> None:
    help_text = setting.help.replace("%", "%%") + f" [{_shown(setting.default)}]"
    if setting.kind is bool:
        positive = [flag_of(setting.name)] + ([setting.alias] if setting.alias else [])
        section.add_argument(*positive, dest=setting.name, action="store_true", help=help_text)
        negative = [flag_of("no_" + setting.name)] + ([setting.disable] if setting.disable else [])
        section.add_argument(*negative, dest=setting.name, action="store_false", help=argparse.SUPPRESS)
        return
    section.add_argument(
        *setting.flags,
        dest=setting.name,
        action="extend" if setting.repeats else "store",
        type=_convert_json if setting.kind is dict else setting.kind,
        choices=setting.choices,
        nargs="+" if setting.is_list else None,
        metavar=None if setting.choices else ("JSON" if setting.kind is dict else setting.kind.__name__.upper()),
        help=help_text,
    )


def _convert_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def unknown_flag_error(flag: str, known: Iterable[str]) -> ConfigError:
    """The error for a flag or key that no group declares, with what to use instead or its nearest neighbour."""
    instead = INSTEAD.get(flag if flag.startswith("--") else flag_of(flag))
    if instead is not None:
        return ConfigError(f"There is no setting {flag} here: {instead}.")
    near = difflib.get_close_matches(flag, list(known), n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]}?" if near else " `slime train --help` lists all."
    return ConfigError(f"Unknown setting {flag}.{hint}")


def read_config_file(path: str, flag: str = "--config") -> dict[str, Any]:
    """The settings of a YAML or TOML file, flat. Raises ConfigError with flag, file and reason."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{flag}: there is no file {path}.")
    try:
        text = file.read_text()
        values = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{flag}: {path} must be a table of settings, got {type(values).__name__}.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def check_value(setting: Setting, value: Any, *, source: str) -> Any:
    """`value` from a file, as the setting's type. Raises ConfigError naming `source`."""
    if value is None and setting.is_optional:
        return None
    if setting.is_list:
        if not isinstance(value, list):
            raise ConfigError(f"{source}: {setting.name} must be a list, got {value!r}.")
        return [_check_item(setting, item, source) for item in value]
    return _check_item(setting, value, source)


def _check_item(setting: Setting, value: Any, source: str) -> Any:
    if setting.kind is float and type(value) is int:
        value = float(value)
    if setting.kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is not setting.kind:
        raise ConfigError(f"{source}: {setting.name} must be {setting.kind.__name__}, got {value!r}.")
    if setting.choices and value not in setting.choices:
        raise ConfigError(f"{source}: {setting.name} must be one of {', '.join(setting.choices)}, got {value!r}.")
    return value


def as_tokens(flag: str, value: Any) -> list[str]:
    """A key of a file as a command line has it: a switch that is off, or no value, is left out."""
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    return [flag, *map(str, value if isinstance(value, list) else [value])]


def reference_page(groups: Iterable[type[Group]]) -> str:
    """Markdown: every setting with its flags, type, default and help."""
    lines = [
        "# Arguments",
        "",
        "Generated by `make docs` from `slime/config` and the backends' `arguments.py`; `make check` compares.",
        "Each setting is a flag of `slime train` (and `python train.py`) and a key of the file given by `--config`.",
    ]
    for group in groups:
        lines += ["", f"## {(group.__doc__ or group.__name__).splitlines()[0].rstrip('.')}", ""]
        lines += ["| flag | type | default | meaning |", "| --- | --- | --- | --- |"]
        for setting in settings_of(group):
            flags = " ".join(f"`{flag}`" for flag in setting.flags)
            kind = " ".join(f"`{choice}`" for choice in setting.choices or ()) or setting.kind.__name__
            kind = f"list of {kind}" if setting.is_list else kind
            meaning = setting.help.replace("|", "\\|")
            lines.append(f"| {flags} | {kind} | `{_shown(setting.default)}` | {meaning} |")
    return "\n".join(lines) + "\n"
