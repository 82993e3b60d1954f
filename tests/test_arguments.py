from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import slime
from slime.arguments import ALL_GROUPS, DERIVED, Args, parse_args, settings_as_dict
from slime.backends.fsdp_utils.arguments import FSDPConfig
from slime.config import ConfigError
from slime.config.flags import INSTEAD, Setting, build_parser, flag_of, reference_page, settings_of

SETTINGS = [setting for group in ALL_GROUPS for setting in settings_of(group)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a Hugging Face directory as far as flags are concerned."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def base(model: Path) -> list[str]:
    return [
        *["--hf-checkpoint", str(model), "--train-backend", "fsdp", "--prompt-data", "prompts.jsonl"],
        *["--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--num-rollout", "3", "--colocate"],
        *["--actor-num-gpus-per-node", "1"],
    ]


def write(path: Path, settings: Any) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


# --- every setting


def example(setting: Setting) -> tuple[list[str], Any]:
    """A flag with a value that is not the default, and what it must become."""
    flag = flag_of(setting.name)
    if setting.kind is bool:
        return ([flag_of("no_" + setting.name)], False) if setting.default else ([flag], True)
    if setting.kind is dict:
        return [flag, '{"a": [1, "b"]}'], {"a": [1, "b"]}
    if setting.choices:
        value: Any = next((choice for choice in setting.choices if choice != setting.default), setting.choices[0])
    else:
        value = {int: 3, float: 0.25, str: "text"}[setting.kind]
    if setting.is_list:
        return [flag, str(value), str(value)], [value, value]
    return [flag, str(value)], value


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_has_a_flag_that_reaches_it(setting: Setting) -> None:
    tokens, expected = example(setting)
    for flag in [tokens[0]] + ([setting.alias] if setting.alias else []):
        parser = build_parser(ALL_GROUPS, prog="slime train", description="")
        namespace = parser.parse_args([flag, *tokens[1:]])
        assert vars(namespace) == {setting.name: expected}
    assert {f.name for f in dataclasses.fields(Args)} >= {setting.name}


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.kind is bool], ids=lambda setting: setting.name)
def test_every_switch_can_be_turned_on_and_off(setting: Setting) -> None:
    parser = build_parser(ALL_GROUPS, prog="slime train", description="")
    off = [flag_of("no_" + setting.name)] + ([setting.disable] if setting.disable else [])
    assert [vars(parser.parse_args([flag])) for flag in off] == [{setting.name: False}] * len(off)
    assert vars(parser.parse_args([off[0], flag_of(setting.name)])) == {setting.name: True}


def test_args_hold_every_setting_once_and_no_other() -> None:
    names = [setting.name for setting in SETTINGS]
    assert len(names) == len(set(names))
    assert {f.name for f in dataclasses.fields(Args)} == set(names) | DERIVED


def _properties(path: Path) -> list[ast.AST]:
    """What a group offers of its fields, without the checks of them."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if function.name != "__post_init__"]


def test_every_setting_is_read_where_it_takes_effect() -> None:
    package = Path(inspect.getfile(slime)).parent
    declarations = {Path(inspect.getfile(group)) for group in ALL_GROUPS}
    read = {
        node.attr
        for path in package.rglob("*.py")
        for part in (_properties(path) if path in declarations else [ast.parse(path.read_text())])
        for node in ast.walk(part)
        if isinstance(node, ast.Attribute)
    }
    with_a_choice = [setting for setting in SETTINGS if setting.choices is None or len(setting.choices) > 1]
    assert [setting.name for setting in with_a_choice if setting.name not in read] == []


def test_no_flag_means_two_things() -> None:
    flags = [flag for setting in SETTINGS for flag in setting.flags]
    assert len(flags) == len(set(flags))


def test_defaults_have_the_type_that_the_setting_declares() -> None:
    for setting in SETTINGS:
        if setting.default is None:
            assert setting.is_optional, setting.name
        else:
            for value in setting.default if setting.is_list else [setting.default]:
                assert type(value) is setting.kind, setting.name
                assert setting.choices is None or value in setting.choices, setting.name


def test_defaults_that_are_containers_are_not_shared() -> None:
    first, second = Args(), Args()
    first.apply_chat_template_kwargs["a"] = 1
    assert second.apply_chat_template_kwargs == {}


def test_every_help_line_is_a_sentence() -> None:
    for setting in SETTINGS:
        assert setting.help[0].isupper() or not setting.help[0].isalpha() or setting.help.startswith(("f(", "jsonl")), (
            setting.name
        )


@pytest.mark.parametrize(
    "flag", ["--disable-rewards-normalization", "--disable-grpo-std-normalization", "--disable-rollout-global-dataset"]
)
def test_documented_disable_flags_work(base: list[str], flag: str) -> None:
    args = parse_args([*base, flag])
    assert settings_as_dict(args)[flag.removeprefix("--disable-").replace("-", "_")] is False


# --- flags


def test_flags_become_typed_settings(base: list[str]) -> None:
    args = parse_args(
        [*base, "--lr=1e-5", "--rollout-stop", "a", "b", "--rollout-stop-token-ids", "1", "2", "--kl-loss-type", "k3"]
    )
    assert (args.lr, args.rollout_stop, args.rollout_stop_token_ids) == (1e-5, ["a", "b"], [1, 2])
    assert args.kl_loss_type == "k3"
    assert args.eps_clip_high == args.eps_clip  # resolved


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout-batchsize", "4"], "Unknown setting --rollout-batchsize. Did you mean --rollout-batch-size?"),
        (["--kl-loss-coeff=0.1"], "Unknown setting --kl-loss-coeff. Did you mean --kl-loss-coef?"),
        (["--disable-reward-normalization"], "Did you mean --disable-rewards-normalization?"),
        (["--qqqqqqqqq"], "Unknown setting --qqqqqqqqq. `slime train --help` lists all."),
        (["--rollout-batch"], "Unknown setting --rollout-batch. Did you mean --rollout-batch-size?"),
        (["stray"], "Unexpected argument 'stray': settings are given as --flag value."),
        (["--lr", "fast"], "Argument --lr: invalid float value: 'fast'."),
        (["--num-rollout", "1.5"], "Argument --num-rollout: invalid int value: '1.5'."),
        (["--kl-loss-type", "k9"], "Argument --kl-loss-type: invalid choice: 'k9'"),
        (["--num-rollout"], "Argument --num-rollout: expected one argument."),
        (["--apply-chat-template-kwargs", "{"], "not JSON: '{'"),
        (["--apply-chat-template-kwargs", "[1]"], "must be a JSON object, got '[1]'"),
        (["--rollout-engine", "sglang", "--sglang-python", "/bin/true"], "sglang: /bin/true has no sglang: install it"),
        (["--rollout-engine", "sglang", "--sglang-python", "absent"], "--sglang-python absent cannot be run"),
        (["--no-colocate", "--rollout-external-engine-addrs", "host"], "takes HOST:PORT, got 'host'"),
        (["--no-colocate", "--rollout-external-engine-addrs", "http://a:1"], "takes HOST:PORT, got 'http://a:1'"),
        (["--no-colocate", "--rollout-external-engine-addrs", "a:1", "a:1"], "names an engine twice"),
        (["--rollout-external-engine-addrs", "a:1"], "Drop --colocate"),
        (["--prefill-num-servers", "1"], "--prefill-num-servers 1 must leave engines that decode; there are 1 in all"),
        (
            ["--actor-num-gpus-per-node", "2", "--prefill-num-servers", "1", "--rollout-engine", "embedded"],
            "--prefill-num-servers needs SGLang",
        ),
        (
            ["--actor-num-gpus-per-node", "2", "--rollout-num-gpus-per-engine", "2"],
            "--rollout-num-gpus-per-engine 2: the embedded engine serves one slot",
        ),
        (["--train-backend", "megatron", "--device", "cpu"], "--device cpu: Megatron trains on GPUs"),
        (["--train-backend", "megatron", "--use-wings"], "Unknown setting --use-wings"),
        (
            ["--train-backend", "megatron", "--tensor-model-parallel-size", "3"],
            "must be a multiple of --tensor-model-parallel-size 3",
        ),
        (
            ["--train-backend", "megatron", "--sequence-parallel"],
            "--sequence-parallel needs --tensor-model-parallel-size",
        ),
        (
            ["--actor-num-gpus-per-node", "2", "--context-parallel-size", "2", "--attn-implementation", "sdpa"],
            "--context-parallel-size 2 needs --attn-implementation packed, got 'sdpa'.",
        ),
        (
            ["--actor-num-gpus-per-node", "3", "--context-parallel-size", "3"],
            "--context-parallel-size 3 must divide the query heads of the model",
        ),
        (["--optimizer-cpu-offload"], "--train-backend fsdp has --fsdp-cpu-offload"),
        (["--train-backend", "megatron", "--fsdp-cpu-offload"], "--train-backend megatron has --optimizer-cpu-offload"),
        (["--train-backend", "megatron", "--gradient-checkpointing"], "Megatron has --recompute-granularity"),
        (["--hf-checkpoint", "absent"], "--hf-checkpoint: there is no directory absent."),
        (["--hf-checkpoint", "."], "--hf-checkpoint: . has no config.json"),
        (["--ref-load", "absent"], "--ref-load: there is no directory absent."),
        (["--config", "absent.yaml"], "--config: there is no file absent.yaml."),
    ],
)
def test_a_flag_that_is_wrong_is_refused_in_one_sentence(
    base: list[str], flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse_args([*base, *flags])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_lists_every_setting_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_args(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert [s.name for s in SETTINGS if flag_of(s.name) not in shown] == []


# --- files


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_a_file_sets_what_flags_do_not(base: list[str], tmp_path: Path, suffix: str) -> None:
    settings = {
        "lr": 1e-5,
        "rollout-stop": ["a"],
        "kl_loss_type": "k2",
        "rewards_normalization": False,
        "num_rollout": 9,
    }
    path = tmp_path / f"run.{suffix}"
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    path.write_text("\n".join(lines) if suffix == "toml" else yaml.safe_dump(settings))
    args = parse_args(["--config", str(path), *base])
    assert (args.lr, args.rollout_stop, args.kl_loss_type, args.rewards_normalization) == (1e-5, ["a"], "k2", False)
    assert args.num_rollout == 3, "flags win"


def test_every_setting_of_fsdp_can_be_given_in_a_file(base: list[str], tmp_path: Path) -> None:
    values = {setting.name: example(setting)[1] for setting in settings_of(FSDPConfig)}
    args = parse_args([*base, "--config", write(tmp_path / "fsdp.yaml", values)])
    assert {name: getattr(args, name) for name in values} == values
    assert any(values[setting.name] != setting.default for setting in settings_of(FSDPConfig))
    with pytest.raises(ConfigError, match=r"fsdp.yaml: .*fsdp_cpu_ofload.* Did you mean fsdp_cpu_offload"):
        parse_args([*base, "--config", write(tmp_path / "fsdp.yaml", {"fsdp_cpu_ofload": True})])


def test_a_flag_wins_over_a_file_even_where_it_says_the_default(base: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {"lr": 0.5, "rewards_normalization": False})
    args = parse_args([*base, f"--config={path}", "--lr", "1e-6", "--rewards-normalization"])
    assert (args.lr, args.rewards_normalization) == (1e-6, True)


def test_what_a_run_writes_down_is_a_file_that_repeats_it(base: list[str], tmp_path: Path) -> None:
    args = parse_args([*base, "--lr", "3e-5", "--eval-prompt-data", "t", "t.jsonl", "--eval-interval", "2"])
    again = parse_args(["--config", write(tmp_path / "run.yaml", settings_as_dict(args))])
    assert settings_as_dict(again) == settings_as_dict(args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1}, "Unknown setting learning_rate"),
        ({"rollout_batchsize": 4}, "Did you mean rollout_batch_size?"),
        ({"lr": "fast"}, "lr must be float, got 'fast'."),
        ({"num_rollout": 1.5}, "num_rollout must be int, got 1.5."),
        ({"num_rollout": True}, "num_rollout must be int, got True."),
        ({"colocate": "yes please"}, "colocate must be bool, got 'yes please'."),
        ({"rollout_stop": "a"}, "rollout_stop must be a list, got 'a'."),
        ({"rollout_stop": [1]}, "rollout_stop must be str, got 1."),
        ({"kl_loss_type": "k9"}, "kl_loss_type must be one of k1, k2, k3, low_var_kl, got 'k9'."),
        ({"n_samples_per_prompt": None}, "n_samples_per_prompt must be int, got None."),
        ({"rollout": {"batch_size": 4}}, "Unknown setting rollout"),
        ([1, 2], "must be a table of settings, got list."),
        (None, "must be a table of settings, got NoneType."),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_name(
    base: list[str], tmp_path: Path, settings: Any, message: str
) -> None:
    path = write(tmp_path / "run.yaml", settings)
    with pytest.raises(ConfigError) as error:
        parse_args(["--config", path, *base])
    assert path in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "text"), [("run.yaml", "a: [1"), ("run.toml", "a = = 1"), ("run.yaml", "a: \x00")])
def test_a_file_that_cannot_be_parsed_is_refused_by_its_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"--config: {tmp_path / name} cannot be read"):
        parse_args(["--config", str(tmp_path / name)])


@pytest.mark.parametrize("text", ["1e-6", "2.5E+3", "7"])
def test_numbers_of_yaml_files_become_floats_however_they_are_written(
    base: list[str], tmp_path: Path, text: str
) -> None:
    (tmp_path / "run.yaml").write_text(f"lr: {text}\n")
    assert parse_args(["--config", str(tmp_path / "run.yaml"), *base]).lr == float(text)


# --- flags that are passed on


def test_engine_flags_are_passed_on_without_their_prefix(base: list[str]) -> None:
    flags = ["--sglang-mem-fraction-static", "0.7", "--sglang-enable-metrics", "--sglang-cuda-graph-bs", "1", "2"]
    args = parse_args([*flags, *base, "--sglang-context-length=4096", "--sglang-seed", "-1"])
    assert args.sglang_args == [
        *["--mem-fraction-static", "0.7", "--enable-metrics", "--cuda-graph-bs", "1", "2"],
        *["--context-length=4096", "--seed", "-1"],
    ]
    assert args.rollout_batch_size == 4


def test_flags_that_only_sglang_knows_pass(base: list[str]) -> None:
    names = "log-level-http tokenizer-mode max-prefill-tokens kv-cache-dtype cuda-graph-max-bs ep-size load-format"
    flags = ["--" + name for name in names.split()]
    assert parse_args([*base, *("--sglang-" + flag[2:] for flag in flags)]).sglang_args == flags


@pytest.mark.parametrize(
    ("config", "flags", "context"),
    [
        ({"max_position_embeddings": 64}, [], 64),
        ({"text_config": {"max_position_embeddings": 48}}, [], 48),
        ({"max_position_embeddings": 64}, ["--rollout-max-context-len", "32"], 32),
        ({"max_position_embeddings": 64}, ["--sglang-context-length=16"], 16),
        ({"max_position_embeddings": 64}, ["--sglang-context-length", "128"], 64),
        ({}, [], None),
    ],
)
def test_the_context_is_the_engines_where_it_is_not_given(
    model: Path, base: list[str], config: dict[str, Any], flags: list[str], context: int | None
) -> None:
    (model / "config.json").write_text(json.dumps(config))
    args = parse_args([*base, *flags])
    assert (args.rollout_max_context_len, args.eval_max_context_len) == (context, context)
    assert args.rollout_max_prompt_len == (31 if "--rollout-max-context-len" in flags else None)


def test_a_model_whose_layers_would_mix_the_samples_of_a_pack_is_refused(model: Path, base: list[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention", "linear_attention"]}))
    with pytest.raises(ConfigError, match="layers of type linear_attention, which would mix the samples"):
        parse_args(base)


def test_a_config_json_that_is_no_json_is_named(model: Path, base: list[str]) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        parse_args(base)


def test_engine_settings_of_slimes_own_are_not_passed_on(base: list[str]) -> None:
    args = parse_args([*base, "--sglang-server-concurrency", "7", "--sglang-mem-fraction-static", "0.7"])
    assert args.sglang_server_concurrency == 7
    assert args.sglang_args == ["--mem-fraction-static", "0.7"]


def test_router_flags_are_passed_on_without_their_prefix(base: list[str]) -> None:
    args = parse_args([*base, "--router-balance-abs-threshold", "10", "--router-policy=round_robin"])
    assert args.router_args == ["--balance-abs-threshold", "10", "--policy=round_robin"]


def test_a_file_passes_on_too_and_flags_come_after(base: list[str], tmp_path: Path) -> None:
    settings = {
        "sglang_mem_fraction_static": 0.5,
        "sglang-enable-metrics": True,
        "sglang_disable_radix_cache": False,
        "sglang_cuda_graph_bs": [1, 2],
        "router_policy": "random",
    }
    args = parse_args(
        ["--config", write(tmp_path / "run.yaml", settings), *base, "--sglang-mem-fraction-static", "0.7"]
    )
    assert args.router_args == ["--policy", "random"]
    assert args.sglang_args[-2:] == ["--mem-fraction-static", "0.7"]
    assert "--disable-radix-cache" not in args.sglang_args
    at = args.sglang_args.index("--cuda-graph-bs")
    assert args.sglang_args[at : at + 3] == ["--cuda-graph-bs", "1", "2"]
    assert "--enable-metrics" in args.sglang_args


@pytest.mark.parametrize("flag", list(INSTEAD))
def test_a_flag_of_other_versions_is_refused_with_what_to_do(base: list[str], flag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"There is no setting {flag} here: {re.escape(INSTEAD[flag])}"):
        parse_args([*base, flag])
    key = flag[2:].replace("-", "_")
    with pytest.raises(ConfigError, match=f"There is no setting {key} here"):
        parse_args(["--config", write(tmp_path / "run.yaml", {key: 1}), *base])
    known = {flag for setting in SETTINGS for flag in setting.flags}
    named = re.findall(r"--[a-z][a-z-]+[a-z]", INSTEAD[flag])
    assert {name for name in named if not name.startswith("--router")} <= known


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mem_fraction_staic": 0.8}, "Did you mean --sglang-mem-fraction-static?"),
        ({"tp_size": 2}, "--sglang-tp-size is set by slime: use --rollout-num-gpus-per-engine."),
        ({"dp_size": 2, "enable_dp_attention": True}, "--sglang-dp-size 2 must divide"),
    ],
)
def test_what_a_group_of_engines_overrides_is_checked(
    base: list[str], tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    group = {"worker_type": "regular", "num_gpus": 1, "overrides": overrides}
    path = write(tmp_path / "engines.yaml", {"sglang": [{"name": "actor", "server_groups": [group]}]})
    with pytest.raises(ConfigError) as error:
        parse_args([*base, "--sglang-config", path])
    assert f"--sglang-config: {path}: actor: " in str(error.value)
    assert message in str(error.value)


def test_another_model_must_be_there(base: list[str], tmp_path: Path) -> None:
    groups = [{"worker_type": "regular", "num_gpus": 1}]
    judge = {"name": "judge", "model_path": "/gone", "server_groups": groups}
    path = write(tmp_path / "engines.yaml", {"sglang": [{"name": "actor", "server_groups": groups}, judge]})
    with pytest.raises(ConfigError, match="--sglang-config: the model_path of judge: there is no directory /gone"):
        parse_args([*base, "--sglang-config", path, "--actor-num-gpus-per-node", "2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sglang-tp-size", "2"], "--sglang-tp-size is set by slime: use --rollout-num-gpus-per-engine."),
        (["--sglang-port=3"], "--sglang-port is set by slime: drop it."),
        (["--sglang-model-path", "x"], "--sglang-model-path is set by slime: use --hf-checkpoint."),
        (["--sglang-mem-fraction-staic", "0.5"], "Did you mean --sglang-mem-fraction-static?"),
        (["--sglang-context-len=64"], "Did you mean --sglang-context-length?"),
        (["--sglang-context-length", "many"], "--sglang-context-length must be above 0, got 'many'."),
        (["--router-balance-abs-treshold", "1"], "Did you mean --router-balance-abs-threshold?"),
        (["--router-policy", "best"], "--router-policy: invalid choice: 'best'"),
        (["--router-qqqqqqqqqqqq"], "Unknown setting --router-qqqqqqqqqqqq."),
    ],
)
def test_a_flag_that_cannot_be_passed_on_is_refused(base: list[str], flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_args([*base, *flags])
    assert message in str(error.value)


# --- the object


def test_args_are_frozen_and_equal_to_themselves_only(base: list[str]) -> None:
    args = parse_args(base)
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.lr = 1.0  # type: ignore[misc]
    assert args == args
    assert args != parse_args(base)
    assert len({args, args}) == 1


def test_args_survive_pickling_with_every_setting(base: list[str]) -> None:
    args = parse_args([*base, "--apply-chat-template-kwargs", '{"a": 1}'])
    copy = pickle.loads(pickle.dumps(args))
    assert settings_as_dict(copy) == settings_as_dict(args)
    assert type(copy) is Args
    assert copy != args
    assert hash(copy) != hash(args)
    assert isinstance(copy, ALL_GROUPS)


def test_the_reference_page_names_every_flag_with_its_default_and_choices() -> None:
    page = reference_page(ALL_GROUPS)
    for setting in SETTINGS:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{flag_of(setting.name)}`")]
        assert all(f"`{flag}`" in line for flag in setting.flags)
        assert all(f"`{choice}`" in line for choice in setting.choices or ())
        assert line.count(" | ") == 3, line


# --- settings of plug-ins


def test_plug_ins_read_settings_of_their_own_from_args(base: list[str]) -> None:
    args = parse_args([*base, "--plugin-settings", '{"max_turns": 3}'])
    copies = (args, dataclasses.replace(args, num_rollout=7), pickle.loads(pickle.dumps(args)))
    assert [copy.max_turns for copy in copies] == [3, 3, 3]  # type: ignore[attr-defined]
    assert Args(**settings_as_dict(args), wandb_key=None, sglang_api_key=None).max_turns == 3  # type: ignore[attr-defined]
    assert getattr(args, "min_turns", None) is None
    with pytest.raises(AttributeError, match="there is no setting 'min_turns'"):
        args.min_turns  # type: ignore[attr-defined]  # noqa: B018


def test_the_file_of_custom_config_path_wins_over_flags_and_brings_settings_of_plug_ins(
    base: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "own.yaml", {"rollout-batch-size": 8, "tools": ["add"], "max_turns": 5})
    flags = ["--custom-config-path", path, "--plugin-settings", '{"max_turns": 3, "depth": 1}']
    args = parse_args([*base, "--rollout-batch-size", "2", *flags])
    assert args.rollout_batch_size == 8
    assert args.plugin_settings == {"max_turns": 5, "depth": 1, "tools": ["add"]}
    with pytest.raises(
        ConfigError, match="--custom-config-path .*own.yaml: rollout_batch_size must be int, got 'many'"
    ):
        write(tmp_path / "own.yaml", {"rollout_batch_size": "many"})
        parse_args([*base, *flags])
    with pytest.raises(ConfigError, match="--custom-config-path: there is no file"):
        parse_args([*base, "--custom-config-path", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("name", ["num_trainers", "metadata_columns", "rollout_batch_size", "not a name"])
def test_settings_of_plug_ins_have_names_of_their_own(base: list[str], name: str) -> None:
    with pytest.raises(ConfigError, match=f"--plugin-settings must be names that slime does not use, got {name!r}"):
        parse_args([*base, "--plugin-settings", json.dumps({name: 1})])
