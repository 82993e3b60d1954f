"""What can be known to be wrong before anything starts: files, keys, plug-ins, model, checkpoint, room for the weights.

Each check raises ValueError with one sentence. None imports torch but that of a checkpoint, and only with --load.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from slime.arguments import Args
from slime.cli.model_files import ModelFiles, read_model_files
from slime.config import ConfigError
from slime.config.base import flag_of
from slime.config.model import experts_shape
from slime.config.rollout import DEFAULT_ROLLOUT_FUNCTION
from slime.data.dataset import RowKeys
from slime.data.files import read_rows
from slime.utils.misc import load_function
from slime.utils.types import Sample
from slime.weight_sync.folder import NUM_VERSIONS, free_bytes, weights_root

logger = logging.getLogger(__name__)

PLUGINS = (
    "rollout_function_path",
    "eval_function_path",
    "data_source_path",
    "buffer_filter_path",
    "custom_generate_function_path",
    "dynamic_sampling_filter_path",
    "rollout_sample_filter_path",
    "rollout_all_samples_process_path",
    "custom_rollout_log_function_path",
    "custom_eval_rollout_log_function_path",
    "agent_function_path",
    "custom_update_weight_post_write_path",
    "custom_rm_path",
    "custom_reward_post_process_path",
    "custom_convert_samples_to_train_data_path",
    "custom_loss_function_path",
    "custom_advantage_function_path",
    "rollout_data_postprocess_path",
    "custom_pg_loss_reducer_function_path",
    "custom_tis_function_path",
)
MEGATRON_PLUGINS = (
    "custom_megatron_init_path",
    "custom_megatron_before_log_prob_hook_path",
    "custom_megatron_before_train_step_hook_path",
    "custom_model_provider_path",
)
ROUTER_DEADLINE_S = 5.0


@dataclass(frozen=True)
class Findings:
    """What the checks have read. num_prompts: None where only the run itself will know."""

    model: ModelFiles
    num_prompts: int | None
    eval_sizes: dict[str, int]


def preflight(args: Args) -> Findings:
    """Check everything that needs no cluster. Raises ValueError with one sentence: what, where, and what to do."""
    model = read_model_files(args.hf_checkpoint)
    if args.use_routing_replay and experts_shape(model.config) is None:
        kind = "rollout-" if args.use_rollout_routing_replay else ""
        raise ConfigError(
            f"--use-{kind}routing-replay: {args.hf_checkpoint}/config.json names no experts: the model is dense. "
            "Drop it."
        )
    _check_plugins(args)
    num_prompts = _check_prompts(args) if args.rollout_global_dataset else None
    eval_sizes = dict(_check_eval_sets(args))
    _check_folders(args, model)
    for name in ("ref_load", "critic_load", "opd_teacher_load"):
        directory = getattr(args, name)
        if directory is not None and not Path(directory).is_dir():
            raise ConfigError(f"{flag_of(name)}: there is no directory {directory}.")
    if args.load is not None:
        _check_checkpoint(args.load, args.ckpt_step, args.train_backend)
    _check_dump(args)
    if args.sglang_router_ip is not None and not args.debug_train_only:
        asyncio.run(_check_router(f"http://{args.sglang_router_ip}:{args.sglang_router_port}"))
    return Findings(model, num_prompts, eval_sizes)


def _check_plugins(args: Args) -> None:
    from slime.training.estimators import estimator_of

    for name in PLUGINS:
        _check_plugin(name, getattr(args, name), args)
    for name in MEGATRON_PLUGINS:
        _check_module(name, getattr(args, name))
    for path in args.rollout_sample_hook_path or []:
        _check_plugin("rollout_sample_hook_path", path, args)
    try:
        estimator_of(args)
    except ValueError as error:
        raise ConfigError(f"--advantage-estimator: {error}") from error


def _check_plugin(name: str, path: str | None, args: Args) -> None:
    if path is None:
        return
    try:
        plugin = load_function(path)
    except ValueError as error:
        raise ConfigError(f"{flag_of(name)}: {error}") from error
    is_rubric = name == "custom_rm_path" and args.custom_rm_style == "verifiers"
    if not callable(plugin) and not is_rubric:
        raise ConfigError(f"{flag_of(name)}: {path} must be a function or a class, got {plugin!r:.40}.")


def _check_module(name: str, path: str | None) -> None:
    """What trainers alone import: their modules may ask for Megatron and for GPUs, which a driver may not have."""
    if path is None:
        return
    module, _, function = path.rpartition(".")
    try:
        is_there = bool(module and function) and importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        is_there = False
    if not is_there:
        raise ConfigError(f"{flag_of(name)}: {path} must be MODULE.FUNCTION, its module on PYTHONPATH.")


# --- data


def _check_dump(args: Args) -> None:
    """The first rollout of --load-debug-rollout-data, unless only a checkpoint says which it is."""
    from slime.rollout.debug_data import existing_dump

    first = args.start_rollout_id if args.start_rollout_id is not None or args.load is not None else 0
    if args.load_debug_rollout_data is not None and first is not None:
        existing_dump(args.load_debug_rollout_data, first)


class Purpose(NamedTuple):
    """What the rows of a file are for. flags: the prefix of its flags. context: None where a filter bounds prompts."""

    flags: str
    reward_key: str | None
    context: int | None


def _check_prompts(args: Args) -> int | None:
    """The number of prompts. Every row is read; None: a data source of the user's own reads them in its own way."""
    assert args.prompt_data is not None
    if not args.data_source_path.startswith("slime."):
        return None
    keys = RowKeys(
        args.input_key,
        args.label_key,
        args.metadata_key,
        args.tool_key,
        tuple(args.metadata_columns),
        args.completion_key,
    )
    context = args.rollout_max_context_len if args.rollout_max_prompt_len is None else None
    count = _check_rows(args, args.prompt_data, keys, Purpose("--", args.reward_key, context))
    if count == 0:
        raise ConfigError(f"--prompt-data: {args.prompt_data} holds no prompts.")
    return count


def _check_eval_sets(args: Args) -> Iterator[tuple[str, int]]:
    from slime.rollout.eval_data import eval_sets

    for eval_set in eval_sets(args):
        own = eval_set.args
        for name in ("custom_generate_function_path", "custom_rm_path"):
            _check_plugin(name, getattr(own, name), own)
        keys = RowKeys(
            own.eval_input_key or own.input_key,
            own.eval_label_key,
            own.metadata_key,
            own.eval_tool_key,
            tuple(own.metadata_columns),
        )
        context = own.eval_max_context_len if own.eval_max_prompt_len is None else None
        count = _check_rows(own, eval_set.path, keys, Purpose("--eval-", own.eval_reward_key, context))
        if count == 0:
            raise ConfigError(f"--eval-prompt-data: {eval_set.path} ({eval_set.name}) holds no prompts.")
        yield eval_set.name, count


def _check_rows(args: Args, path: str, keys: RowKeys, purpose: Purpose) -> int:
    """The number of rows. Raises ValueError, with file and line, at the first that the run could not use."""
    by_default = _samples_by_default(args, purpose)
    needs_text = by_default and args.custom_generate_function_path is None
    count = 0
    for row in read_rows(path):
        sample = keys.read(row)
        if needs_text and not args.apply_chat_template and not isinstance(sample.prompt, str):
            raise ConfigError(f"{row.location}: the prompt is a list of chat messages: add --apply-chat-template.")
        if needs_text and purpose.context is not None:
            _check_length(args, sample, row.location, purpose)
        _check_reward(args, sample, row.location, purpose)
        count += 1
    return count


def _check_length(args: Args, sample: Sample, location: str, purpose: Purpose) -> None:
    """Without a filter a prompt must leave room for an answer. A token has a byte at least: few are tokenized."""
    assert purpose.context is not None
    text = sample.prompt if isinstance(sample.prompt, str) else "".join(str(m.get("content")) for m in sample.prompt)
    if len(text.encode()) < purpose.context:
        return
    from slime.rollout.tokenizer import tokenizer_of

    num_tokens = len(tokenizer_of(args)(text, add_special_tokens=False)["input_ids"])
    if num_tokens >= purpose.context:
        flag = "--eval-max-prompt-len" if purpose.flags == "--eval-" else "--rollout-max-prompt-len"
        raise ConfigError(
            f"{location}: the prompt has {num_tokens} tokens, the context {purpose.context}. Take it out, or set "
            f"{flag} to leave such prompts out."
        )


def _samples_by_default(args: Args, purpose: Purpose) -> bool:
    function = args.eval_function_path if purpose.flags == "--eval-" else None
    return (function or args.rollout_function_path) == DEFAULT_ROLLOUT_FUNCTION


def _check_reward(args: Args, sample: Sample, location: str, purpose: Purpose) -> None:
    """A rule must be known; the default rollout needs one, with the label and the key that go with it."""
    from slime.rollout.rm_hub import RULES_OF_DICTS, RULES_WITH_LABEL

    name = _rule(args, sample, location)
    rules_decide = args.custom_rm_path is None and args.custom_generate_function_path is None
    if not (rules_decide and _samples_by_default(args, purpose)):
        return
    if name is None:
        raise ConfigError(f"{location}: no reward is chosen: give --rm-type or --custom-rm-path.")
    if name in RULES_WITH_LABEL and sample.label is None:
        raise ConfigError(f"{location}: the rule {name} compares with a label: name its key with --label-key.")
    if name in RULES_OF_DICTS and purpose.reward_key is None:
        raise ConfigError(
            f"{location}: the rewards of the rule {name} are dicts: name the entry to use with "
            f"{purpose.flags}reward-key, such as score."
        )
    if name == "ifbench" and not sample.metadata.get("instruction_id_list"):
        raise ConfigError(
            f"{location}: the rule ifbench needs 'instruction_id_list' in the metadata: see docs/rewards.md."
        )
    if name == "remote_rm" and args.rm_url is None:
        raise ConfigError(f"{location}: the rule remote_rm needs the address of its server: give --rm-url.")


def _rule(args: Args, sample: Sample, location: str) -> str | None:
    """The name of the rule that scores `sample`: its own, else that of --rm-type. Raises ValueError if unknown."""
    from slime.rollout.rm_hub import check_rm_type

    own = sample.metadata.get("rm_type")
    try:
        return check_rm_type(str(own or args.rm_type)) if own or args.rm_type else None
    except ValueError as error:
        raise ValueError(f"{location}: {error}" if own else str(error)) from error


# --- folders, checkpoint, router


def _check_folders(args: Args, model: ModelFiles) -> None:
    for name in ("run_dir", "save", "update_weight_disk_dir"):
        folder = getattr(args, name)
        if folder is not None:
            _check_writable(Path(folder), flag_of(name))
    _warn_of_checkpoints(args)
    if args.debug_train_only:
        return
    run_dir = Path(args.run_dir or args.save or "runs")
    root = weights_root(args.update_weight_disk_dir, run_dir, num_bytes=model.num_bytes)
    wanted, free = NUM_VERSIONS * model.num_bytes, free_bytes(root)
    if wanted > free:
        raise ConfigError(
            f"{root} has {free / 2**30:.1f} GiB free, two versions of the weights take {wanted / 2**30:.1f}: name a "
            "larger folder with --update-weight-disk-dir."
        )


def _warn_of_checkpoints(args: Args) -> None:
    """A run that does not go on from what lies in --save writes over it, step by step."""
    if args.save is None or (args.load is not None and Path(args.load).resolve() == Path(args.save).resolve()):
        return
    tracker = Path(args.save) / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        logger.warning(
            "--save %s holds checkpoints of another run, up to step %s, and this one writes over them: --resume goes "
            "on from there",
            args.save,
            tracker.read_text().strip(),
        )


def _check_writable(folder: Path, flag: str) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{flag}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{flag}: nothing can be written below {existing}.")


def _check_checkpoint(folder: str, step: int | None, backend: str) -> None:
    if not Path(folder).is_dir():
        if step is not None:
            raise ConfigError(f"--ckpt-step {step}: there is no folder {folder} to load it from.")
        return
    from slime.backends.fsdp_utils import checkpoint
    from slime.backends.megatron_utils import folders

    find = folders.find_checkpoint if backend == "megatron" else checkpoint.find_checkpoint
    find(folder, step)


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
