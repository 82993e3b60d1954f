"""On-policy distillation (arXiv:2306.13649, arXiv:2306.08543): a teacher scores each token that the student sampled.

The reward is dense and per token, where the other estimators have one score a sample. It is an estimator of its own, or
a KL penalty on top of any other.
"""

from __future__ import annotations

from torch import Tensor


def reverse_kl(old_log_probs_T: Tensor, teacher_log_probs_T: Tensor) -> Tensor:
    """[T] one-sample estimate of KL(student || teacher) at each token: student minus teacher log-prob."""
    return old_log_probs_T - teacher_log_probs_T


def advantages(old_log_probs_T: Tensor, teacher_log_probs_T: Tensor) -> Tensor:
    """[T] minus the reverse KL: positive where the teacher finds the token likelier than the student did."""
    return -reverse_kl(old_log_probs_T, teacher_log_probs_T)


def with_teacher(advantages_T: Tensor, old_log_probs_T: Tensor, *, teacher_log_probs_T: Tensor, coef: float) -> Tensor:
    """[T] any estimator's advantages minus coef times the reverse KL to the teacher."""
    return advantages_T - coef * reverse_kl(old_log_probs_T, teacher_log_probs_T)
