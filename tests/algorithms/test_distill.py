from __future__ import annotations

import torch

from slime.algorithms import distill


def test_the_expected_reverse_kl_is_the_divergence_of_student_from_teacher() -> None:
    student = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    teacher = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    expected = (student * (student / teacher).log()).sum()
    torch.testing.assert_close((student * distill.reverse_kl(student.log(), teacher.log())).sum(), expected)


def test_a_token_is_good_where_the_teacher_finds_it_likelier() -> None:
    student_T, teacher_T = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -1.0])
    assert distill.advantages(student_T, teacher_T).tolist() == [-1, 0, 2]


def test_as_a_penalty_it_is_subtracted_from_any_advantage() -> None:
    advantages_T, student_T, teacher_T = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, 0.0])
    result = distill.with_teacher(advantages_T, student_T, teacher_log_probs_T=teacher_T, coef=0.5)
    assert result.tolist() == [0.0, 1.5]
