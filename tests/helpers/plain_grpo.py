"""GRPO and SFT once more, as a reader of the papers would write them: one sequence at a time, in float64, no FSDP."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from slime.arguments import Args
from slime.utils.types import Sample


@dataclass
class PlainRun:
    """losses, grad_norms: one an optimizer step. weights: after the last, by name; first_weights: before the first."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    first_weights: dict[str, Tensor] = field(default_factory=dict)


def load(directory: str | Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model with transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def log_softmax(model: PreTrainedModel, tokens: list[int], temperature: float) -> Tensor:
    """[N - 1, V] of one sequence alone: row i says what is likely at place i + 1."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return (logits / temperature).log_softmax(-1)


def response_log_probs(model: PreTrainedModel, sample: Sample, temperature: float) -> Tensor:
    """[response_length]"""
    table = log_softmax(model, sample.tokens, temperature)
    picked = table[torch.arange(len(sample.tokens) - 1), torch.tensor(sample.tokens[1:])]
    return picked[-sample.response_length :]


def response_entropy(model: PreTrainedModel, sample: Sample, temperature: float) -> Tensor:
    """[response_length]"""
    table = log_softmax(model, sample.tokens, temperature)
    return -(table.exp() * table).sum(-1)[-sample.response_length :]


def train(directory: str | Path, samples: list[Sample], args: Args, *, reference: str | Path | None = None) -> PlainRun:
    """One rollout's worth of optimizer steps."""
    model = load(directory)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
    )
    ref = _frozen(load(reference or directory), samples, args)
    old = _frozen(model, samples, args)
    if args.use_rollout_logprobs:
        old = [torch.tensor(sample.rollout_log_probs, dtype=torch.float64) for sample in samples]
    advantages = _advantages(samples, args, old, ref)
    run = PlainRun(first_weights={name: p.detach().clone() for name, p in model.named_parameters()})
    num_steps = args.num_steps_per_rollout or 1
    size = len(samples) // num_steps
    for start in range(0, len(samples), size):
        rows = range(start, start + size)
        loss = _loss(model, samples, rows, args, old=old, ref=ref, advantages=advantages)
        optimizer.zero_grad()
        loss.backward()
        run.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or 1e30)))
        run.losses.append(loss.item())
        optimizer.step()
    run.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return run


def _frozen(model: PreTrainedModel, samples: list[Sample], args: Args) -> list[Tensor]:
    with torch.no_grad():
        return [response_log_probs(model, sample, args.rollout_temperature) for sample in samples]


def _advantages(samples: list[Sample], args: Args, old: list[Tensor], ref: list[Tensor]) -> list[float]:
    rewards = [float(sample.reward or 0) for sample in samples]  # type: ignore[arg-type]
    if args.kl_coef:
        for row, sample in enumerate(samples):
            kl = _kl(old[row] - ref[row], args.kl_loss_type)
            rewards[row] -= args.kl_coef * float((kl * _mask(sample)).sum())
    if not args.rewards_normalization:
        return rewards
    result = []
    for sample, reward in zip(samples, rewards, strict=True):
        group = torch.tensor(
            [r for s, r in zip(samples, rewards, strict=True) if s.group_index == sample.group_index],
            dtype=torch.float64,
        )
        value = reward - float(group.mean())
        if args.grpo_std_normalization:
            value /= float(group.std()) + 1e-6
        result.append(value)
    return result


def _mask(sample: Sample) -> Tensor:
    return torch.tensor(sample.loss_mask or [1] * sample.response_length, dtype=torch.float64)


def _kl(d: Tensor, kind: str) -> Tensor:
    k3 = torch.exp(-d) - 1 + d
    return {"k1": d, "k2": d * d / 2, "k3": k3, "low_var_kl": k3.clip(max=10)}[kind]


def _loss(
    model: PreTrainedModel,
    samples: list[Sample],
    rows: range,
    args: Args,
    *,
    old: list[Tensor],
    ref: list[Tensor],
    advantages: list[float],
) -> Tensor:
    assert args.eps_clip_high is not None
    sums, lengths = [], []
    for row in rows:
        new = response_log_probs(model, samples[row], args.rollout_temperature)
        if args.loss_type == "sft_loss":
            per_token = -new
        else:
            ratio = torch.exp(new - old[row])
            bounded = ratio.clip(1 - args.eps_clip, 1 + args.eps_clip_high)
            per_token = -torch.minimum(ratio * advantages[row], bounded * advantages[row])
            per_token = per_token + args.kl_loss_coef * _kl(new - ref[row], args.kl_loss_type)
            per_token = per_token - args.entropy_coef * response_entropy(model, samples[row], args.rollout_temperature)
        mask = _mask(samples[row])
        sums.append((per_token * mask).sum())
        lengths.append(mask.sum())
    if args.calculate_per_token_loss:
        return torch.stack(sums).sum() / torch.stack(lengths).sum()
    return torch.stack([s / length.clip(min=1) for s, length in zip(sums, lengths, strict=True)]).mean()
