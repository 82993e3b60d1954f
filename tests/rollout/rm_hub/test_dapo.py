import pytest

from slime.rollout.rm_hub.dapo import dapo_reward, final_answer, normalize
from slime.rollout.rm_hub.errors import RewardError
from slime.utils.types import Sample


@pytest.mark.parametrize(
    "answer",
    ["1000", "1,000", r"1{,}000", r"1,\!000", "$1000$", r"\$1000", r"\boxed{1000}", r"$\boxed{1000}$", "x = 1000",
     "1000.", "1000.0", r"1000 \text{ cm}", "1000 dollars", r"1000^\circ", r"1000^{\circ}", r"1000\%", "**1000**",
     r"\text{1000 meters}", r"\mathrm{1000}\,"],
)  # fmt: skip
def test_spellings_of_one_number_normalize_to_it(answer):
    assert normalize(answer) == "1000"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\tfrac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\text{yes}", "yes"),
        ("the square", "square"),
    ],
)
def test_equal_answers_normalize_to_one_spelling(one, other):
    assert normalize(one) == normalize(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,2", "12"),
        ("10", "1"),
        ("-3", "3"),
        ("0.5", "5"),
        ("1000.5", "1000"),
        ("and", "nd"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
    ],
)
def test_different_answers_stay_different(one, other):
    assert normalize(one) != normalize(other)


def test_the_last_answer_line_counts():
    assert final_answer("Answer: 1\nno:\n**Answer:** $2$ \nbye") == "2"
    assert final_answer("answer : 7") == "7"
    assert final_answer("the answer is 7") == ""


def test_right_scores_plus_one_and_wrong_minus_one():
    right = Sample(response="...\nAnswer: \\boxed{34}", label="34")
    assert dapo_reward(None, right) == {"score": 1.0, "acc": True, "pred": "34"}
    assert dapo_reward(None, Sample(response="Answer: 35", label="34")) == {"score": -1.0, "acc": False, "pred": "35"}
    assert dapo_reward(None, Sample(response="34", label="34")) == {"score": -1.0, "acc": False, "pred": ""}


def test_a_sample_without_a_label_is_an_error():
    with pytest.raises(RewardError, match="sample 3: the sample has no label"):
        dapo_reward(None, Sample(response="Answer: 1", index=3))
