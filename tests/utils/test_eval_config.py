"""The file of --eval-config as it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.utils.eval_config import read_eval_config


def write(folder: Path, text: str) -> str:
    (folder / "sets.yaml").write_text(text)
    return str(folder / "sets.yaml")


def test_an_entry_of_a_set_comes_before_one_of_the_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        eval:
          defaults: {temperature: 0.5, top_p: 0.9}
          datasets:
            - {name: a, path: a.jsonl, temperature: 0.0}
            - {name: b, path: b.jsonl}
        """,
    )
    a, b = read_eval_config(path)
    assert (a.name, a.path, a.overrides) == ("a", "a.jsonl", {"temperature": 0.0, "top_p": 0.9})
    assert b.overrides == {"temperature": 0.5, "top_p": 0.9}


def test_a_sets_own_rule_takes_the_place_of_the_defaults_function(tmp_path: Path) -> None:
    sets = "defaults: {custom_rm_path: m.f}, datasets: [{name: a, path: a, rm_type: math}, {name: b, path: b}]"
    a, b = read_eval_config(write(tmp_path, f"eval: {{{sets}}}"))
    assert (a.overrides, b.overrides) == ({"rm_type": "math"}, {"custom_rm_path": "m.f"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval: [", "sets.yaml is not YAML"),
        ("sets: {}", "sets.yaml has an unknown key 'sets'"),
        ("{}", "sets.yaml has no key 'eval'"),
        ("eval: {}", "eval has no key 'datasets'"),
        ("eval: {datasets: []}", "eval.datasets must be a list of sets, got []"),
        ("eval: {datasets: [a.jsonl]}", "eval.datasets[0] must be a table, got 'a.jsonl'"),
        ("eval: {datasets: [{name: a}]}", "eval.datasets[0] has no key 'path'"),
        ("eval: {datasets: [{name: 3, path: a}]}", "eval.datasets[0]: name must be text, got 3"),
        ("eval: {datasets: [{name: a, path: a, temprature: 1}]}", "key 'temprature'. Did you mean temperature?"),
        ("eval: {defaults: {path: a}, datasets: [{name: a, path: a}]}", "eval.defaults has an unknown key 'path'"),
        ("eval: {datasets: [{name: a, path: a}, {name: a, path: b}]}", "two sets are named 'a'"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_eval_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="--eval-config: nowhere.yaml cannot be read"):
        read_eval_config("nowhere.yaml")
