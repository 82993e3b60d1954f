"""Groups that are too old to be trained on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from slime.rollout.data_source import DataSource
from slime.rollout.staleness import NotOnPolicy, check_on_policy, staleness, without_stale
from slime.utils.types import Sample


class Returned(DataSource):
    """Keeps what comes back."""

    def __init__(self) -> None:
        self.groups: list[list[Sample]] = []

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        return []

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.groups += samples

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...

    def __len__(self) -> int:
        return 0


def args(bound: int | None, policy: str = "refresh") -> Any:
    return SimpleNamespace(max_weight_staleness=bound, stale_samples=policy, n_samples_per_prompt=2)


def group(group_index: int, *versions: list[str]) -> list[Sample]:
    return [
        Sample(
            group_index=group_index, index=10 * group_index + place, prompt="1+1=", label="2", tokens=[1, 2, 3],
            response="ab", response_length=2, reward=1.0, rollout_log_probs=[-1.0, -1.0], weight_versions=own,
        )
        for place, own in enumerate(versions)
    ]  # fmt: skip


def test_staleness_counts_from_the_first_token_of_the_response() -> None:
    (sample,) = group(0, ["4", "6"])
    assert [staleness(sample, rollout_id) for rollout_id in (4, 6, 7)] == [0, 2, 3]
    assert staleness(Sample(weight_versions=["default"]), 7) == 0


def test_the_prompts_of_groups_that_are_too_old_are_sampled_anew() -> None:
    old, young = group(0, ["5"], ["3", "4"]), group(1, ["4"], ["5"])
    source = Returned()
    kept, metrics = without_stale(args(1), 5, [old, young], source)
    assert kept == [young]
    assert metrics == {"rollout/staleness/num_refreshed": 1.0, "rollout/staleness/num_dropped": 0.0}
    assert source.groups == [[Sample(group_index=0, index=index, prompt="1+1=", label="2") for index in (0, 1)]]


def test_they_are_dropped_where_that_is_asked_for_or_a_sample_is_missing() -> None:
    for groups, policy in (
        ([group(0, ["1"], ["1"]), group(1, ["5"], ["5"])], "drop"),
        ([group(0, ["1"]), group(1, ["5"])], "refresh"),
    ):
        source = Returned()
        kept, metrics = without_stale(args(2, policy), 5, groups, source)
        assert kept == groups[1:]
        assert source.groups == []
        assert metrics == {"rollout/staleness/num_refreshed": 0.0, "rollout/staleness/num_dropped": 1.0}


def test_siblings_of_one_generate_call_are_one_prompt_again() -> None:
    old = group(0, ["1"], ["1"])
    source = Returned()
    without_stale(args(2), 5, [[old[0], *old], group(1, ["5"])], source)
    assert [sample.index for sample in source.groups[0]] == [0, 1]


def test_without_a_bound_nothing_is_too_old() -> None:
    groups = [group(0, ["1"])]
    assert without_stale(args(None), 50, groups, Returned()) == (groups, {})


def test_a_rollout_that_is_too_old_altogether_is_an_error() -> None:
    with pytest.raises(ValueError, match="all 1 groups of rollout 5 .* --max-weight-staleness 2 versions old"):
        without_stale(args(2), 5, [group(0, ["1"])], Returned())


def test_on_policy_is_what_the_weights_that_are_trained_have_sampled() -> None:
    silent = Sample(index=9, weight_versions=[])  # failed before a token came
    check_on_policy([group(0, ["5"], ["5", "5"]), [silent]], 5)
    for versions, found in ((["4"], "4"), (["4", "5"], "4, 5"), ([], "no engine that names its version")):
        message = f"sample 11 was sampled by {found}, the weights that are trained are 5"
        with pytest.raises(NotOnPolicy, match=message):
            check_on_policy([group(0, ["5"], ["5"]), group(1, ["5"], versions)], 5)
