from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import make_tiny_model

from slime.backends.fsdp_utils.model import TokenModel, load_causal_lm
from slime.backends.fsdp_utils.prompt_sharing import shared_prompts
from slime.data.batch import batch_from_samples
from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import Wants
from slime.utils.types import Sample

P, Q = [11, 12], [13]


def packed(*sequences: tuple[list[int], list[int]]) -> PackedBatch:
    """Sequences of (prompt, response)."""
    samples = [Sample(group_index=0, tokens=p + r, response_length=len(r)) for p, r in sequences]
    batch = batch_from_samples(samples, [0.0] * len(samples))
    return pack_rows(batch, range(len(batch)), batch.loss_mask)


def test_the_worked_example() -> None:
    sharing = shared_prompts(packed((P, [1, 2]), (P, [3]), (Q, [4])))
    assert sharing is not None
    assert sharing.first.tolist() == [0, 1, 2, 3, 6, 7, 8]
    assert sharing.place.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert sharing.again is not None
    assert sharing.again.tolist() == [4, 5]
    assert sharing.owner is not None
    assert sharing.owner.tolist() == [0, 1]


def test_activations_and_their_gradients_are_those_of_plain_indexing() -> None:
    sharing = shared_prompts(packed((P, [1, 2]), (P, [3]), (P, [4, 5, 6]), (Q, [4])))
    assert sharing is not None
    plain = sharing._replace(again=None, owner=None)
    torch.manual_seed(0)
    computed = torch.randn(len(sharing.first), 3, 2, dtype=torch.float64)
    outputs, gradients = [], []
    for each in (sharing, plain):
        leaf = computed.clone().requires_grad_()
        spread = each.spread(leaf)
        collected = each.collect(spread.square() * torch.arange(1.0, len(sharing.place) + 1)[:, None, None])
        (collected.sin().sum() + spread.cos().sum()).backward()
        outputs.append((spread.detach(), collected.detach()))
        gradients.append(leaf.grad)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "sequences",
    [
        [(P, [1])],
        [(P, [1]), (Q, [1])],
        [([11], [12, 1]), (P, [1])],  # equal tokens, but response in one and prompt in the other
        [([11, 12, 13], [1]), (P, [1])],  # one prompt begins with the other
    ],
)
def test_prompts_that_differ_are_not_shared(sequences: list[tuple[list[int], list[int]]]) -> None:
    assert shared_prompts(packed(*sequences)) is None


def test_a_rank_without_samples_shares_nothing() -> None:
    batch = batch_from_samples([Sample(group_index=0, tokens=[1, 2], response_length=1)], [0.0])
    assert shared_prompts(pack_rows(batch, [], batch.loss_mask)) is None


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {},
    "deepseek_v3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_log_probs_and_gradients_are_those_without_sharing(architecture: str, tmp_path: Path) -> None:
    """In any order of the samples, and with fewer tokens through the model."""
    directory = make_tiny_model(tmp_path, architecture, **CONFIGS[architecture])
    long, short = list(range(40, 57)), [7]
    batch = packed((long, [1, 2, 3]), (short, [4] * 9), (long, [5]), (P, [6, 7]), (short, [8]), (long, [9, 1, 1, 2]))
    results = []
    for share in (True, False):
        lm = load_causal_lm(str(directory), attn_implementation="packed").eval()
        widths: list[int] = []
        lm.get_decoder().embed_tokens.register_forward_hook(
            lambda module, inputs, output, widths=widths: widths.append(output.shape[1])
        )
        outputs = TokenModel(lm, temperature=0.8, chunk_size=5, share_prompts=share)(batch, Wants(entropy=True))
        ((outputs.log_probs + 0.1 * outputs.entropy) * torch.linspace(-1, 1, len(outputs.log_probs))).sum().backward()
        results.append((outputs, {name: p.grad for name, p in lm.named_parameters()}, widths))
    (ours, our_grads, our_widths), (plain, plain_grads, plain_widths) = results
    assert (our_widths, plain_widths) == ([75 - 2 * 17 - 1], [75])
    torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.entropy, plain.entropy, rtol=0, atol=2e-6)
    for name, gradient in our_grads.items():
        torch.testing.assert_close(gradient, plain_grads[name], rtol=1e-4, atol=2e-6, msg=name)
