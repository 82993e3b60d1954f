import pytest

from slime.rollout.rm_hub.answers import extract_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {a_{b_{c}}} }", "a_{b_{c}}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{ 5" + "\n}", "5"),
        (r"no box: 42", ""),
        (r"\boxed{1} and \boxed{cut", ""),
    ],
)
def test_the_last_box_is_taken_with_its_braces_balanced(text, answer):
    assert extract_boxed(text) == answer
