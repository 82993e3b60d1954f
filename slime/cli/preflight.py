"""What can be known to be wrong before anything starts: files, keys, plug-ins, model, checkpoint, room for the weights.

Each check raises ValueError with one sentence. None imports torch but that of a checkpoint, and only with --load.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slime.arguments import Args
from slime.cli.model_files import ModelFiles, read_model_files
from slime.config import ConfigError
from slime.config.base import flag_of
from slime.data.dataset import RowKeys
from slime.data.files import read_rows
from slime.utils.misc import load_function
from slime.utils.types import Sample

PLUGINS = (
    "rollout_function_path",
    "eval_function_path",
    "data_source_path",
    "buffer_filter_path",
    "custom_generate_function_path",
    "custom_rm_path",
    "custom_reward_post_process_path",
)
DEFAULT_ROLLOUT = "slime.rollout.sglang_rollout.generate_rollout"
ROUTER_DEADLINE_S = 5.0


@dataclass(frozen=True)
class Findings:
    """What the checks have read. num_prompts: None where the rollout function finds its own."""

    model: ModelFiles
    num_prompts: int | None
    eval_sizes: dict[str, int]


def preflight(args: Args) -> Findings:
    """Check everything that needs no cluster. Raises ValueError with one sentence: what, where, and what to do."""
    model = read_model_files(args.hf_checkpoint)
    _check_plugins(args)
    num_prompts = _check_prompts(args, model.context_length) if args.rollout_global_dataset else None
    eval_sizes = dict(_check_eval_sets(args))
    _check_folders(args, model)
    if args.load is not None:
        _check_checkpoint(args.load, args.ckpt_step)
    if args.sglang_router_ip is not None and not args.debug_train_only:
        asyncio.run(_check_router(f"http://{args.sglang_router_ip}:{args.sglang_router_port}"))
    return Findings(model, num_prompts, eval_sizes)


def _check_plugins(args: Args) -> None:
    for name in PLUGINS:
        path = getattr(args, name)
        if path is None:
            continue
        try:
            plugin = load_function(path)
        except ValueError as error:
            raise ConfigError(f"{flag_of(name)}: {error}") from error
        if not callable(plugin):
            raise ConfigError(f"{flag_of(name)}: {path} must be a function or a class, got {plugin!r:.40}.")


# --- data


def _check_prompts(args: Args, context_length: int | None) -> int:
    """The number of prompts. Every row is read; a data source of the user's own may read them in its own way."""
    assert args.prompt_data is not None
    if not args.data_source_path.startswith("slime."):
        return 0
    keys = RowKeys(args.input_key, args.label_key, args.metadata_key, args.tool_key)
    samples = _samples(args, args.prompt_data, keys, context_length, args.rollout_max_prompt_len)
    first = next(samples, None)
    if first is None:
        raise ConfigError(f"--prompt-data: {args.prompt_data} holds no prompts.")
    _check_reward(args, first)
    return 1 + sum(1 for _ in samples)


def _check_eval_sets(args: Args) -> Iterator[tuple[str, int]]:
    pairs = args.eval_prompt_data or []
    keys = RowKeys(args.eval_input_key or args.input_key, args.eval_label_key, args.metadata_key, args.eval_tool_key)
    for name, path in zip(pairs[::2], pairs[1::2], strict=True):
        count = sum(1 for _ in _samples(args, path, keys, None, args.eval_max_prompt_len))
        if count == 0:
            raise ConfigError(f"--eval-prompt-data: {path} ({name}) holds no prompts.")
        yield name, count


def _samples(
    args: Args, path: str, keys: RowKeys, context_length: int | None, max_prompt_len: int | None
) -> Iterator[Sample]:
    """Every row as a sample. Raises ValueError, with file and line, at the first that the run could not use."""
    needs_text = _samples_by_default(args) and args.custom_generate_function_path is None
    for row in read_rows(path):
        sample = keys.read(row)
        if needs_text and not args.apply_chat_template and not isinstance(sample.prompt, str):
            raise ConfigError(f"{row.location}: the prompt is a list of chat messages: add --apply-chat-template.")
        if needs_text and context_length is not None and max_prompt_len is None:
            _check_length(args, sample, row.location, context_length)
        yield sample


def _check_length(args: Args, sample: Sample, location: str, context_length: int) -> None:
    """Without a filter a prompt must leave room for an answer. A token has a byte at least: few are tokenized."""
    text = sample.prompt if isinstance(sample.prompt, str) else "".join(str(m.get("content")) for m in sample.prompt)
    if len(text.encode()) < context_length:
        return
    from slime.utils.processing_utils import load_tokenizer

    num_tokens = len(load_tokenizer(args.hf_checkpoint)(text, add_special_tokens=False)["input_ids"])
    if num_tokens >= context_length:
        raise ConfigError(
            f"{location}: the prompt has {num_tokens} tokens, the model's context {context_length}. Take it out, or "
            "set --rollout-max-prompt-len to leave such prompts out."
        )


def _samples_by_default(args: Args) -> bool:
    return args.rollout_function_path == DEFAULT_ROLLOUT and not args.debug_train_only


def _check_reward(args: Args, first: Sample) -> None:
    """--rm-type must be known; with the default rollout there must be some reward."""
    from slime.rollout.rm_hub import check_rm_type

    rm_type = first.metadata.get("rm_type") or args.rm_type
    if rm_type is not None:
        check_rm_type(rm_type)
    elif _samples_by_default(args) and args.custom_rm_path is None and args.custom_generate_function_path is None:
        raise ConfigError("no reward is chosen: give --rm-type or --custom-rm-path.")


# --- folders, checkpoint, router


def _check_folders(args: Args, model: ModelFiles) -> None:
    for name in ("run_dir", "save", "update_weight_disk_dir"):
        folder = getattr(args, name)
        if folder is not None:
            _check_writable(Path(folder), flag_of(name))
    root = Path(args.update_weight_disk_dir or "/dev/shm")
    if args.debug_train_only or not root.is_dir():
        return
    wanted, free = 2 * model.num_bytes, shutil.disk_usage(root).free
    if wanted > free:
        raise ConfigError(
            f"{root} has {free / 2**30:.1f} GiB free, two versions of the weights take {wanted / 2**30:.1f}: name a "
            "larger folder with --update-weight-disk-dir."
        )


def _check_writable(folder: Path, flag: str) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{flag}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{flag}: nothing can be written below {existing}.")


def _check_checkpoint(folder: str, step: int | None) -> None:
    if not Path(folder).is_dir():
        if step is not None:
            raise ConfigError(f"--ckpt-step {step}: there is no folder {folder} to load it from.")
        return
    from slime.backends.fsdp_utils.checkpoint import find_checkpoint

    find_checkpoint(folder, step)


async def _check_router(url: str) -> None:
    from slime.utils import http_utils

    advice = "Start a sglang-router there, or leave out --sglang-router-ip and --sglang-router-port."
    try:
        answer = await http_utils.get(f"{url}/workers", timeout_s=ROUTER_DEADLINE_S)
    except http_utils.HTTPError as error:
        raise ConfigError(f"no router answers at {url} ({error}). {advice}") from error
    finally:
        await http_utils.close()
    if not isinstance(answer, dict) or "workers" not in answer:
        raise ConfigError(f"what listens at {url} is not a sglang-router. {advice}")
