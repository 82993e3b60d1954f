import pytest

from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput, call_rollout_fn
from slime.utils.types import Sample

GROUPS = [[Sample(index=0)], [Sample(index=1)]]


def returns(value):
    def generate_rollout(args, rollout_id, data_buffer, evaluation=False):
        return value

    return generate_rollout


def test_an_output_object_passes_through_with_its_metrics():
    output = RolloutFnTrainOutput(GROUPS, {"rollout/x": 1.0})
    assert call_rollout_fn(returns(output), None, 0, None, evaluation=False) is output


def test_a_bare_list_or_dict_is_wrapped():
    assert call_rollout_fn(returns(GROUPS), None, 0, None, evaluation=False) == RolloutFnTrainOutput(GROUPS)
    assert call_rollout_fn(returns({"a": {}}), None, 0, None, evaluation=True) == RolloutFnEvalOutput({"a": {}})


def test_the_third_parameter_may_have_any_name_and_evaluation_is_passed():
    def generate(args, rollout_id, anything, evaluation):
        return {"seen": {"args": args, "rollout_id": rollout_id, "source": anything, "evaluation": evaluation}}

    output = call_rollout_fn(generate, "args", 3, "source", evaluation=True)
    assert output.data["seen"] == {"args": "args", "rollout_id": 3, "source": "source", "evaluation": True}


@pytest.mark.parametrize(
    ("value", "evaluation"),
    [(None, False), ({"a": {}}, False), (RolloutFnEvalOutput({}), False), (None, True), (GROUPS, True)],
)
def test_another_kind_of_output_is_refused_by_name(value, evaluation):
    with pytest.raises(ValueError, match="generate_rollout .*must return RolloutFn"):
        call_rollout_fn(returns(value), None, 0, None, evaluation=evaluation)


def test_samples_that_are_not_in_groups_are_refused():
    with pytest.raises(ValueError, match="entry 0 is a Sample"):
        call_rollout_fn(returns([Sample()]), None, 0, None, evaluation=False)
