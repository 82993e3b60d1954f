"""The examples of docs/rewards.md do what it says, from a folder outside the package."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slime.rollout.rm_hub import RULES, async_rm, batched_async_rm
from slime.utils.async_utils import run
from slime.utils.eval_config import KEYS, read_eval_config
from slime.utils.types import Sample

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with every file of the page."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in re.findall(r"```(?:python|yaml)\n# (?:--eval-config )?(\S+)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@dataclass(frozen=True)
class RewardArgs:
    custom_rm_path: str
    custom_rm_style: str = "slime"
    group_rm: bool = False
    apply_chat_template: bool = False
    label_key: str = "label"
    rollout_skip_special_tokens: bool = True
    rm_timeout_s: float = 60.0
    rm_num_workers: int | None = None


@pytest.mark.parametrize(
    ("args", "reward"),
    [
        (RewardArgs("my_rewards.short"), 0.5),
        (RewardArgs("my_rewards.slow_grader"), {"score": 1.0, "length": 2}),
        (RewardArgs("my_graders.length_reward", "trl"), -2.0),
        (RewardArgs("my_graders.compute_score", "verl"), 1.0),
        (RewardArgs("my_graders.load_environment", "verifiers"), 1.0),
    ],
)
def test_the_functions_of_the_page_score(args: RewardArgs, reward: Any) -> None:
    sample = Sample(prompt="3+4=?", response="34", label="34", tokens=[1, 2], response_length=1)
    assert run(async_rm(args, sample)) == reward
    assert ("seen" in sample.metadata) == (args.custom_rm_path == "my_rewards.slow_grader")


def test_the_group_function_of_the_page_scores_a_group() -> None:
    args = RewardArgs("my_rewards.best_of_group", group_rm=True)
    assert run(batched_async_rm(args, [Sample(response="a"), Sample(response="ab")])) == [0.0, 1.0]


def test_the_evaluation_sets_of_the_page_are_read(folder: Path) -> None:
    arithmetic, science, mine = read_eval_config(str(folder / "sets.yaml"))
    assert arithmetic.n_samples_per_eval_prompt == 4
    assert (science.n_samples_per_eval_prompt, science.temperature) == (16, 0.6)
    assert mine.custom_rm_path == "my_rewards.slow_grader"


def test_the_page_names_every_rule_and_every_key_of_a_set() -> None:
    assert [name for name in (*RULES, *KEYS) if f"`{name}`" not in PAGE and name not in ("name", "path")] == []
