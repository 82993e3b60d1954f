"""Log-probs by chunks of logits against those of all logits at once, in float64."""

import pytest
import torch
from torch import Tensor, nn

from slime.backends.shared.target_log_probs import LogitRule, target_log_probs

NUM_TOKENS, WIDTH, VOCABULARY = 23, 6, 50


def at_once(hidden: Tensor, head: nn.Linear, targets: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    log_probs = (logits / rule.temperature).log_softmax(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("wants_entropy", [False, True])
@pytest.mark.parametrize("rule", [LogitRule(1.0, None, 5), LogitRule(0.7, None, 100), LogitRule(1.3, 2.0, 1)])
def test_values_and_gradients_equal_those_of_all_logits_at_once(
    rule: LogitRule, wants_entropy: bool, has_bias: bool
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=has_bias)
    hidden = torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (NUM_TOKENS,))
    weights = torch.randn(2, NUM_TOKENS)
    exact_head = nn.Linear(WIDTH, VOCABULARY, bias=has_bias, dtype=torch.float64)
    exact_head.load_state_dict(head.state_dict())
    exact_hidden = hidden.detach().double().requires_grad_()

    log_probs, entropy = target_log_probs(hidden, head, targets, rule, entropy=wants_entropy)
    expected, expected_entropy = at_once(exact_hidden, exact_head, targets, rule)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=2e-6)
    assert (entropy is not None) == wants_entropy
    ours, exact = (weights[0] * log_probs).sum(), (weights[0] * expected).sum()
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=2e-6)
        ours, exact = ours + (weights[1] * entropy).sum(), exact + (weights[1] * expected_entropy).sum()
    ours.backward()
    exact.backward()
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=0, atol=1e-5)
    for mine, reference in zip(head.parameters(), exact_head.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=0, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_no_tokens_are_no_error() -> None:
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    rule = LogitRule(1.0, None, 4)
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    target_log_probs(hidden, head, torch.tensor([0, 1, 2]), rule, entropy=False)[0].sum().backward()
    assert head.weight.grad is None and hidden.grad is not None and bool(hidden.grad.any())
    log_probs, _ = target_log_probs(hidden[:0], head, torch.zeros(0, dtype=torch.int64), rule, entropy=True)
    assert log_probs.shape == (0,)


def test_an_entropy_that_is_only_looked_at_changes_no_gradient() -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY)
    hidden, targets = torch.randn(NUM_TOKENS, WIDTH), torch.randint(0, VOCABULARY, (NUM_TOKENS,))
    gradients = []
    for wants_entropy in (False, True):
        leaf = hidden.clone().requires_grad_()
        log_probs, entropy = target_log_probs(leaf, head, targets, LogitRule(0.7, None, 5), entropy=wants_entropy)
        (log_probs.square().sum() + (0 if entropy is None else entropy.detach().sum())).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    leaf = hidden.clone().requires_grad_()
    target_log_probs(leaf, head, targets, LogitRule(0.7, None, 5), entropy=True)[1].sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.any())


def test_logits_far_from_zero_stay_finite() -> None:
    head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [-1e4], [0.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    log_probs, entropy = target_log_probs(hidden, head, torch.tensor([0]), LogitRule(1.0, None, 8), entropy=True)
    (log_probs + entropy).sum().backward()
    assert log_probs.tolist() == [0.0] and entropy.tolist() == [0.0]
    assert bool(hidden.grad.isfinite().all())
