"""What a user may get wrong: one sentence that says where and what to do, at once, and nothing is started."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from slime.utils.processes import sole_user
from tests.e2e.cpu.helpers.runs import Starter


class Case(NamedTuple):
    """flags: made from the test's folder, into which `prepare` may write. says: all that the message must contain."""

    flags: Callable[[Path], list[str]]
    says: tuple[str, ...]
    code: int = 2


def _file(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def _prompts(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--prompt-data", _file(folder, "mine.jsonl", text)]


def _config(name: str, text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--config", _file(folder, name, text)]


def _flags(*flags: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(flags)


DEFAULT = ("--rollout-function-path", "slime.rollout.sglang_rollout.generate_rollout")
GOOD = json.dumps({"prompt": "1+2=", "label": "3"}) + "\n"
CHAT = json.dumps({"prompt": [{"role": "user", "content": "1+2="}], "label": "3"}) + "\n"
CASES = {
    "a missing prompt file": Case(_flags("--prompt-data", "nowhere.jsonl"), ("nowhere.jsonl", "does not exist"), 1),
    "a bad json line": Case(_prompts(GOOD * 2 + '{"prompt": \n'), ("mine.jsonl:3", "not valid JSON"), 1),
    "a missing key": Case(_prompts(GOOD + '{"text": "x"}\n'), ("mine.jsonl:2", "'prompt'", "--input-key"), 1),
    "a missing label": Case(_prompts('{"prompt": "x"}\n'), ("mine.jsonl:1", "'label'", "--label-key"), 1),
    "an empty data set": Case(_prompts(""), ("mine.jsonl", "holds no prompts")),
    "an empty slice": Case(lambda folder: [*_prompts(GOOD)(folder)[:1], f"{folder}/mine.jsonl@[5:]"], ("no prompts",)),
    "a prompt longer than the context": Case(
        lambda folder: [*DEFAULT, *_prompts(GOOD + json.dumps({"prompt": "0" * 4000, "label": "0"}) + "\n")(folder)],
        ("mine.jsonl:2", "4000 tokens", "2048", "--rollout-max-prompt-len"),
    ),
    "chat messages without a template": Case(
        lambda folder: [*DEFAULT, *_prompts(CHAT)(folder), "--no-apply-chat-template"],
        ("mine.jsonl:1", "--apply-chat-template")
    ),
    "a misspelt flag": Case(
        _flags("--rolout-batch-size", "2"), ("--rolout-batch-size", "Did you mean --rollout-batch")
    ),
    "a misspelt key in a YAML file": Case(
        _config("run.yaml", "rollout_bach_size: 2\n"),
        ("run.yaml", "rollout_bach_size", "Did you mean rollout_batch_size")
    ),
    "a misspelt key in a TOML file": Case(
        _config("run.toml", "n-sample-per-prompt = 2\n"), ("run.toml", "Did you mean n_samples_per_prompt")
    ),
    "a value of another type": Case(_config("run.yaml", "lr: fast\n"), ("run.yaml", "lr", "float", "'fast'")),
    "a config file that is no YAML": Case(_config("run.yaml", "lr: [1\n"), ("run.yaml", "cannot be read")),
    "contradictory flags": Case(_flags("--kl-coef", "0.1", "--kl-loss-coef", "0.1"), ("--kl-coef", "--kl-loss-coef")),
    "batches that do not divide": Case(_flags("--global-batch-size", "3"), ("--global-batch-size 3", "2 x")),
    "more rollout slots than there can be": Case(
        _flags("--no-colocate"), ("--rollout-num-gpus must be given", "--colocate")
    ),
    "a plug-in that does not import": Case(
        _flags("--custom-rm-path", "nowhere.reward"), ("--custom-rm-path", "'nowhere.reward'", "PYTHONPATH")
    ),
    "a plug-in module without the function": Case(
        _flags("--custom-rm-path", "recorder.nothing"), ("--custom-rm-path", "'recorder'", "'nothing'")
    ),
    "a plug-in that is no function": Case(
        _flags("--custom-rm-path", "recorder.not_callable"), ("must be a function", "got 3")
    ),
    "a plug-in with a syntax error": Case(
        lambda folder: ["--custom-rm-path", Path(_file(folder, "broken.py", "def f(:\n")).stem + ".f"],
        ("--custom-rm-path", "SyntaxError", "broken.py"),
    ),
    "an unknown rule": Case(_flags("--rm-type", "maths"), ("--rm-type", "math,", "'maths'"), 1),
    "no model": Case(_flags("--hf-checkpoint", "nowhere"), ("--hf-checkpoint", "nowhere")),
    "a run directory that is a file": Case(
        lambda folder: ["--run-dir", _file(folder, "taken", "")], ("--run-dir", "taken is a file")
    ),
    "a step that is not there": Case(
        lambda folder: ["--load", str(folder), "--ckpt-step", "7"], ("iter_0000007", "present: none"), 1
    ),
}  # fmt: skip


def _refuses(start: Starter, flags: list[str], case: Case) -> None:
    run = start(*flags)
    assert run.wait() == case.code, run.output()
    (line,) = run.output().splitlines()
    assert line.startswith("error: ")
    for part in case.says:
        assert part in line
    assert not run.run_dir.exists()
    run.leaves_nothing(within_s=1)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_one_sentence_before_anything_starts(start: Starter, name: str) -> None:
    _refuses(start, CASES[name].flags(start.folder), CASES[name])


def test_a_model_whose_weights_do_not_fit_its_config_is_refused(start: Starter) -> None:
    copy = shutil.copytree(start.model, start.folder / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    says = ("mlp.down_proj.weight", "(64, 128)", "(64, 96)")
    _refuses(start, ["--hf-checkpoint", str(copy)], Case(_flags(), says))


def test_weights_that_are_cut_off_are_refused(start: Starter) -> None:
    copy = shutil.copytree(start.model, start.folder / "model")
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-100])
    _refuses(start, ["--hf-checkpoint", str(copy)], Case(_flags(), ("model.safetensors", "cut off")))


def test_an_external_router_that_is_not_there_is_refused(start: Starter) -> None:
    with socket.socket() as bound:  # not listening: nobody answers, and nobody else can take the port
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
        says = ("no router answers", port, "--sglang-router-ip")
        _refuses(start, ["--sglang-router-ip", "127.0.0.1", "--sglang-router-port", port], Case(_flags(), says))


@pytest.mark.parametrize("flag", ["--run-dir", "--save"])
def test_a_folder_that_another_run_writes_to_is_refused(start: Starter, flag: str) -> None:
    folder = start.folder / ("ckpt" if flag == "--save" else "run")
    folder.mkdir()
    with sole_user(folder):
        run = start(flag, str(folder))
        assert run.wait() == 2, run.output()
    assert run.output() == f"error: {flag}: another run writes to {folder}. Wait for its end, or name another folder.\n"
    assert list(folder.iterdir()) == []
    run.leaves_nothing(within_s=1)


def test_dry_run_prints_the_plan_and_starts_nothing(start: Starter) -> None:
    run = start("--dry-run", "--eval-interval", "1", "--eval-prompt-data", "held", f"{start.prompts}@[:4]").succeeds()
    for part in ("2 prompts x 4 samples = 8 samples", "40 in", "4 prompts", "115,072", "each trainer", "each engine"):
        assert part in run.output()
    assert not run.run_dir.exists()
    run.leaves_nothing(within_s=1)
