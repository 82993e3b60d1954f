"""How old the weights are that sampled a response, and what becomes of groups that are too old to be trained on.

Version v of the weights is the policy after v rollouts, so rollout N is trained on by version N:

    staleness of a sample = N - the oldest version that sampled one of its tokens        (0 in a synchronous run)
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from slime.rollout.data_source import DataSource
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

Groups = list[list[Sample]]

# What of a sample is its prompt, and not its response.
_PROMPT_FIELDS = (
    "group_index", "index", "prompt", "label", "multimodal_inputs", "apply_chat_template_kwargs", "metadata",
    "generate_function_path", "custom_rm_path", "session_id",
)  # fmt: skip


class FreshGroups(NamedTuple):
    """groups: those to train on. metrics: how many were too old."""

    groups: Groups
    metrics: dict[str, float]


def staleness(sample: Sample, rollout_id: int) -> int:
    """Its staleness in rollout `rollout_id`; 0 where the engine named no version."""
    oldest = sample.oldest_weight_version
    return 0 if oldest is None else max(0, rollout_id - oldest)


def without_stale(args: Any, rollout_id: int, groups: Groups, data_source: DataSource) -> FreshGroups:
    """The groups that --max-weight-staleness allows in rollout `rollout_id`; none is too old where it is not given.

    --stale-samples refresh: the prompts of the others go back to the data source, to be sampled anew in a later
    rollout; drop: they are gone. A group that has lost a sample cannot be given back and is dropped. Raises ValueError
    where no group is left.
    """
    bound = args.max_weight_staleness
    if bound is None:
        return FreshGroups(groups, {})
    stale = [group for group in groups if any(staleness(sample, rollout_id) > bound for sample in group)]
    if stale and len(stale) == len(groups):
        raise ValueError(
            f"all {len(groups)} groups of rollout {rollout_id} were sampled by weights more than "
            f"--max-weight-staleness {bound} versions old: raise it, or sample fewer tokens ahead."
        )
    renewed = [renew(group) for group in stale] if args.stale_samples == "refresh" else []
    returned = [group for group in renewed if len(group) == args.n_samples_per_prompt]
    if returned:
        data_source.add_samples(returned)
    if stale:
        logger.warning("rollout %d: %d of %d groups too old, %d of them sampled anew", rollout_id, len(stale),
                       len(groups), len(returned))  # fmt: skip
    stale_ids = {id(group) for group in stale}
    metrics = {
        "rollout/staleness/num_refreshed": float(len(returned)),
        "rollout/staleness/num_dropped": float(len(stale) - len(returned)),
    }
    return FreshGroups([group for group in groups if id(group) not in stale_ids], metrics)


class NotOnPolicy(RuntimeError):
    """A sample was not, or not only, sampled by the weights that are trained."""


def check_on_policy(groups: Groups, weight_version: int) -> None:
    """Raise NotOnPolicy unless version `weight_version` sampled every response, with its index and its versions."""
    wanted = {str(weight_version)}
    for sample in (sample for group in groups for sample in group):
        if sample.response_length and set(sample.weight_versions) != wanted:
            found = ", ".join(sorted(set(sample.weight_versions))) or "no engine that names its version"
            raise NotOnPolicy(
                f"--true-on-policy-mode: sample {sample.index} was sampled by {found}, the weights that are trained "
                f"are {weight_version}. A generation function must hand `meta_info` to Sample.append_response_tokens."
            )


def renew(group: list[Sample]) -> list[Sample]:
    """The prompts of a group with nothing sampled; siblings that one generate call fanned out become one again."""
    prompts = {sample.index: sample for sample in group}
    return [Sample(**{name: getattr(sample, name) for name in _PROMPT_FIELDS}) for sample in prompts.values()]
