import copy
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.rollout.data_source import RolloutDataSource, RolloutDataSourceWithBuffer
from slime.utils.types import Sample, SampleStatus
from tests.helpers.tiny_models import make_tokenizer

NUM_PROMPTS = 5


@dataclass(frozen=True)
class SourceArgs:
    prompt_data: str | None = None
    hf_checkpoint: str | None = None
    trust_remote_code: bool = False
    rollout_max_prompt_len: int | None = None
    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    metadata_columns: tuple[str, ...] = ()
    completion_key: str | None = None
    apply_chat_template: bool = False
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    rollout_shuffle: bool = False
    rollout_seed: int = 42
    n_samples_per_prompt: int = 1
    buffer_filter_path: str | None = None
    rollout_global_dataset: bool = True
    save: str | None = None
    load: str | None = None


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    rows = [{"input": f"p{n}", "metadata": {"n": [n]}} for n in range(NUM_PROMPTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceArgs(prompt_data=str(folder / "rows.jsonl"), save=str(folder), load=str(folder))


def take_last(args, rollout_id, buffer, num_samples):
    return [buffer.pop() for _ in range(min(num_samples, len(buffer)))]


def take_all(args, rollout_id, buffer, num_samples):
    groups = list(buffer)
    buffer.clear()
    return groups


def take_copies(args, rollout_id, buffer, num_samples):
    return buffer[:num_samples]


def prompts(groups):
    return [group[0].prompt for group in groups]


def test_a_group_holds_independent_copies_with_consecutive_indices(args):
    source = RolloutDataSource(dataclasses.replace(args, n_samples_per_prompt=3))
    groups = source.get_samples(2)
    assert [[sample.index for sample in group] for group in groups] == [[0, 1, 2], [3, 4, 5]]
    assert [[sample.group_index for sample in group] for group in groups] == [[0, 0, 0], [1, 1, 1]]
    groups[0][0].metadata["n"].append("changed")
    groups[0][0].tokens.append(1)
    groups[0][0].spec_info.spec_verify_ct = 9
    assert groups[0][1] == Sample(prompt="p0", metadata={"n": [0]}, group_index=0, index=1)
    assert source.dataset.samples[0] == Sample(prompt="p0", metadata={"n": [0]})


def test_a_copy_equals_a_deep_copy_of_a_sample_with_every_kind_of_field(args):
    source = RolloutDataSource(args)
    prototype = Sample(prompt=[{"role": "user", "content": [{"text": "x"}]}], metadata={"a": (1, [2])}, label="2")
    source.dataset.samples = [prototype] * NUM_PROMPTS
    ((sample,),) = source.get_samples(1)
    assert sample == dataclasses.replace(copy.deepcopy(prototype), group_index=0, index=0)
    assert sample.prompt[0]["content"][0] is not prototype.prompt[0]["content"][0]
    assert sample.metadata["a"][1] is not prototype.metadata["a"][1]


@given(requests=st.lists(st.integers(0, 3 * NUM_PROMPTS + 1), max_size=12), shuffle=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_sequence_of_requests_walks_the_epochs_without_gap_or_repeat(args, requests, shuffle):
    source = RolloutDataSource(dataclasses.replace(args, rollout_shuffle=shuffle))
    groups = [group for request in requests for group in source.get_samples(request)]
    seen = prompts(groups)
    assert len(seen) == sum(requests)
    assert [group[0].index for group in groups] == list(range(len(seen)))
    everything = [f"p{n}" for n in range(NUM_PROMPTS)]
    for start in range(0, len(seen), NUM_PROMPTS):
        epoch = seen[start : start + NUM_PROMPTS]
        if len(epoch) == NUM_PROMPTS:
            assert sorted(epoch) == everything
        if not shuffle:
            assert epoch == everything[: len(epoch)]


@given(before=st.integers(0, 13), after=st.integers(1, 13), shuffle=st.booleans(), buffered=st.integers(0, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_a_resumed_source_continues_exactly(args, before, after, shuffle, buffered):
    args = dataclasses.replace(args, rollout_shuffle=shuffle, n_samples_per_prompt=2)
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(before)
    source.add_samples(groups[:buffered])
    source.update_metadata({"seen": before})
    source.save(7)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(7)
    assert resumed.get_metadata() == {"seen": before}
    assert resumed.get_buffer_length() == len(groups[:buffered])
    assert resumed.get_samples(after) == source.get_samples(after)
    assert resumed.state_dict() == source.state_dict()


def test_two_epochs_are_shuffled_differently(args):
    source = RolloutDataSource(dataclasses.replace(args, rollout_shuffle=True))
    first, second = prompts(source.get_samples(NUM_PROMPTS)), prompts(source.get_samples(NUM_PROMPTS))
    assert first != second and sorted(first) == sorted(second)


def test_a_buffered_partial_sample_comes_back_whole_after_a_resume(args):
    source = RolloutDataSourceWithBuffer(args)
    ((sample,),) = source.get_samples(1)
    sample.append_response_tokens(tokens=[5, 6], log_probs=[-0.1, -1e-9], text="ab", meta_info={"weight_version": "3"})
    sample.status = SampleStatus.ABORTED
    source.add_samples([[sample]])
    source.save(1)
    resumed = RolloutDataSourceWithBuffer(args)
    resumed.load(1)
    assert resumed.get_samples(1) == [[sample]]


def test_the_buffer_is_given_out_before_new_prompts(args):
    source = RolloutDataSourceWithBuffer(args)
    groups = source.get_samples(3)
    source.add_samples(groups[1:])
    assert prompts(source.get_samples(3)) == ["p1", "p2", "p3"]
    assert source.get_buffer_length() == 0


def test_a_buffer_filter_chooses_the_groups(args):
    source = RolloutDataSourceWithBuffer(dataclasses.replace(args, buffer_filter_path=f"{__name__}.take_last"))
    source.add_samples(source.get_samples(3))
    assert prompts(source.get_samples(2)) == ["p2", "p1"]


@pytest.mark.parametrize("name", ["take_all", "take_copies"])
def test_a_buffer_filter_that_takes_too_many_or_leaves_them_inside_is_refused(args, name):
    source = RolloutDataSourceWithBuffer(dataclasses.replace(args, buffer_filter_path=f"{__name__}.{name}"))
    source.add_samples(source.get_samples(3))
    with pytest.raises(ValueError, match=f"--buffer-filter-path .*{name} must take at most 2 groups"):
        source.get_samples(2)


def test_a_group_of_another_size_is_not_buffered(args):
    source = RolloutDataSourceWithBuffer(args)
    with pytest.raises(ValueError, match="a group of 2 samples .* --n-samples-per-prompt is 1"):
        source.add_samples([[Sample()], [Sample(), Sample()]])
    assert source.get_buffer_length() == 0


def test_a_source_without_a_buffer_says_which_one_has_it(args):
    with pytest.raises(ValueError, match="RolloutDataSourceWithBuffer"):
        RolloutDataSource(args).add_samples([[Sample()]])


def test_without_a_global_dataset_samples_are_empty_but_numbered(args):
    source = RolloutDataSource(
        dataclasses.replace(args, rollout_global_dataset=False, prompt_data=None, n_samples_per_prompt=2)
    )
    assert len(source) == 0
    groups = source.get_samples(2)
    assert groups[1] == [Sample(group_index=1, index=2), Sample(group_index=1, index=3)]
    source.save(3)
    source.load(3)
    assert source.get_samples(1)[0][0].index == 4


def test_a_run_that_starts_at_rollout_0_or_has_nothing_to_load_starts_at_the_first_prompt(args):
    source = RolloutDataSource(args)
    source.load(-1)
    source.load(None)
    RolloutDataSource(dataclasses.replace(args, load=None)).load(5)
    assert prompts(source.get_samples(1)) == ["p0"]


def test_a_missing_state_is_an_error_not_a_restart(args, tmp_path):
    source = RolloutDataSource(dataclasses.replace(args, load=str(tmp_path)))
    with pytest.raises(ValueError, match="cannot continue after rollout 4: .*state_dict_4.pt does not exist"):
        source.load(4)


def test_the_state_of_another_prompt_set_is_refused(args):
    RolloutDataSource(args).save(9)
    shorter = RolloutDataSource(dataclasses.replace(args, prompt_data=f"{args.prompt_data}@[:3]"))
    with pytest.raises(ValueError, match="belongs to 5 prompts, --prompt-data now has 3"):
        shorter.load(9)


def test_a_state_without_a_buffer_does_not_load_where_one_is_expected(args):
    RolloutDataSource(args).save(8)
    with pytest.raises(ValueError, match="lacks buffer"):
        RolloutDataSourceWithBuffer(args).load(8)


def test_missing_prompt_data_and_a_missing_save_folder_name_their_flags(args):
    with pytest.raises(ValueError, match="--prompt-data"):
        RolloutDataSource(dataclasses.replace(args, prompt_data=None))
    with pytest.raises(ValueError, match="--save"):
        RolloutDataSource(dataclasses.replace(args, save=None)).save(0)


def test_template_and_length_filter_use_the_tokenizer_of_the_checkpoint(args, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    chat = dataclasses.replace(args, hf_checkpoint=str(tmp_path), apply_chat_template=True, rollout_max_prompt_len=512)
    assert prompts(RolloutDataSource(chat).get_samples(1)) == [
        "<|im_start|>user\np0<|im_end|>\n<|im_start|>assistant\n"
    ]
