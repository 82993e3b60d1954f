"""The file of --eval-config: evaluation sets, and what each does differently from the settings of the run.

    eval:
      defaults: {n_samples_per_eval_prompt: 4, temperature: 0.6}
      datasets:
        - {name: arithmetic, path: arithmetic.jsonl, rm_type: math}
        - {name: science, path: science.jsonl, rm_type: gpqa, n_samples_per_eval_prompt: 16}

An entry of a data set comes before one of the defaults, those before the --eval-X flags, those before the rollout's.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class EvalDatasetConfig:
    """One evaluation set; None: as the settings of the run have it. Values are the file's, their types unchecked."""

    name: str
    path: str
    n_samples_per_eval_prompt: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_response_len: int | None = None
    max_prompt_len: int | None = None
    min_new_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    input_key: str | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = None
    metadata_columns: list[str] | None = None
    apply_chat_template: bool | None = None
    apply_chat_template_kwargs: dict[str, Any] | None = None
    rm_type: str | None = None
    custom_rm_path: str | None = None
    custom_rm_style: str | None = None
    reward_key: str | None = None
    custom_generate_function_path: str | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """What the file says of this set, by key, name and path aside."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {key: value for key, value in given.items() if value is not None and key not in ("name", "path")}


KEYS = tuple(item.name for item in dataclasses.fields(EvalDatasetConfig))
_REWARD_KEYS = frozenset({"rm_type", "custom_rm_path"})  # two ways to say the same: a set's own drops the default's


def read_eval_config(path: str) -> list[EvalDatasetConfig]:
    """The sets of a YAML file, defaults filled in. Raises ValueError, one sentence with file, set and key."""
    section = _table(_table(_read(path), {"eval"}, path)["eval"], {"datasets"}, f"{path}: eval", also={"defaults"})
    defaults = section.get("defaults") or {}
    _check_keys(defaults, set(KEYS) - {"name", "path"}, f"{path}: eval.defaults")
    entries = section["datasets"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: eval.datasets must be a list of sets, got {entries!r:.80}")
    sets = [_set(entry, defaults, f"{path}: eval.datasets[{number}]") for number, entry in enumerate(entries)]
    names = [entry.name for entry in sets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two sets are named {twice!r}; metrics go by the name")
    return sets


def _read(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--eval-config: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--eval-config: {path} is not YAML: {' '.join(str(error).split())}") from error


def _set(entry: Any, defaults: dict[str, Any], where: str) -> EvalDatasetConfig:
    entry = _table(entry, {"name", "path"}, where, also=set(KEYS))
    for key in ("name", "path"):
        if not isinstance(entry[key], str) or not entry[key]:
            raise ValueError(f"{where}: {key} must be text, got {entry[key]!r}")
    if _REWARD_KEYS & entry.keys():
        defaults = {key: value for key, value in defaults.items() if key not in _REWARD_KEYS}
    return EvalDatasetConfig(**{**defaults, **entry})


def _table(value: Any, required: Set[str], where: str, *, also: Set[str] = frozenset()) -> dict[str, Any]:
    _check_keys(value, required | also, where)
    missing = sorted(required - value.keys())
    if missing:
        raise ValueError(f"{where} has no key {missing[0]!r}")
    return dict(value)


def _check_keys(value: Any, known: Set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table, got {value!r:.80}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" It may have {', '.join(sorted(known))}."
            raise ValueError(f"{where} has an unknown key {key!r}.{hint}")
