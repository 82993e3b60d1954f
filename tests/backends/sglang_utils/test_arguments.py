"""Flags of SGLang: read off its source, checked, and added up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slime.backends.sglang_utils.arguments import check_flags, find_sglang, known_flags, tensor_parallel_size, value_of
from slime.config import ConfigError

SERVER_ARGS = """
class ServerArgs:
    mem_fraction_static: A[float | None, Arg(help="--not-a-flag is prose")] = None
    tp_size: A[int, Arg(aliases=["--tensor-parallel-size"])] = 1
    enable_x: bool = True

    def add_cli_args(parser):
        parser.add_argument("--tool-call-parser", type=str)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder laid out as SGLang's, fields of its settings in two files."""
    srt = tmp_path / "sglang" / "srt"
    (srt / "arg_groups" / "fields").mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("raise RuntimeError('nobody shall import it')")
    (srt / "server_args.py").write_text(SERVER_ARGS)
    (srt / "arg_groups" / "fields" / "memory.py").write_text("class Memory:\n    page_size: int = 1\n")
    return tmp_path / "sglang"


def test_flags_are_fields_and_their_other_names(package: Path) -> None:
    known = known_flags(package)
    expected = {"--mem-fraction-static", "--tp-size", "--tensor-parallel-size", "--tool-call-parser", "--page-size"}
    assert expected | {"--enable-x", "--no-enable-x"} <= known
    assert "--not-a-flag" not in known


def test_sglang_is_found_without_being_imported(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package.parent))
    find_sglang.cache_clear()
    assert find_sglang(None) == package
    find_sglang.cache_clear()


def test_another_python_is_asked_for_its_own_sglang(package: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert find_sglang(str(python)) == package


def test_a_python_that_cannot_be_run_is_named() -> None:
    with pytest.raises(ConfigError, match="--sglang-python /absent/python cannot be run"):
        find_sglang("/absent/python")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--mem-fraction-statik", "1"], "--sglang-mem-fraction-statik. Did you mean --sglang-mem-fraction-static?"),
        (["--qqqqqq"], "--sglang-qqqqqq: the SGLang that is installed has no --qqqqqq"),
        (["--tp", "2"], "--sglang-tp is set by slime: use --rollout-num-gpus-per-engine"),
        (["--weight-version=3"], "--sglang-weight-version is set by slime: drop it"),
        (["--trust-remote-code"], "--sglang-trust-remote-code is set by slime: use --trust-remote-code"),
    ],
)
def test_flags_that_are_unknown_or_slimes_own_are_refused(package: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_flags(tokens, known_flags(package), is_complete=True)
    assert message in str(error.value)


def test_where_nobody_can_look_flags_up_only_near_misses_are_refused() -> None:
    check_flags(["--kv-cache-dtype", "--1", "-1"], ["--mem-fraction-static"], is_complete=False)
    with pytest.raises(ConfigError, match="Did you mean --sglang-mem-fraction-static"):
        check_flags(["--mem-fraction-staic"], ["--mem-fraction-static"], is_complete=False)


def test_the_last_value_counts_whatever_its_form() -> None:
    assert value_of(["--dp-size", "2", "--x", "--dp-size=4"], "--dp-size", "--data-parallel-size") == "4"
    assert value_of(["--x", "2"], "--dp-size") is None


@pytest.mark.parametrize(
    ("tokens", "slots", "size"),
    [([], 4, 4), (["--pp-size", "2"], 8, 4), (["--dp-size=4", "--enable-dp-attention"], 8, 8)],
)
def test_pipeline_stages_share_an_engines_slots_and_attention_replicas_do_not(
    tokens: list[str], slots: int, size: int
) -> None:
    assert tensor_parallel_size(tokens, slots) == size


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--pp-size", "3"], "--sglang-pp-size 3 must divide --rollout-num-gpus-per-engine 4"),
        (["--dp-size", "2"], "--sglang-dp-size 2 needs --sglang-enable-dp-attention"),
        (["--dp-size", "3", "--enable-dp-attention"], "--sglang-dp-size 3 must divide"),
        (["--dp-size", "two"], "--sglang-dp-size must be above 0, got 'two'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tensor_parallel_size(tokens, 4)
    assert message in str(error.value)
