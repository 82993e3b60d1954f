"""How progress is measured."""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.base import Group, arg, check, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Group):
    """Evaluation: held-out prompts, and sampling that falls back to the rollout's."""

    eval_interval: int | None = arg(None, "Rollouts between two evaluations.")
    eval_prompt_data: list[str] | None = arg(None, "Pairs of a name and a prompt file.")
    eval_config: str | None = arg(
        None, "YAML file of evaluation sets with settings of their own; replaces --eval-prompt-data."
    )
    eval_function_path: str | None = arg(None, "Replaces evaluation (default: --rollout-function-path).")
    skip_eval_before_train: bool = arg(False, "No evaluation before the first rollout.")
    eval_input_key: str | None = arg(None, "Key of the prompt (default: --input-key).")
    eval_label_key: str | None = arg(None, "Key of the answer (default: --label-key).")
    eval_tool_key: str | None = arg(None, "Key of the tools (default: --tool-key).")
    n_samples_per_eval_prompt: int = arg(1, "Responses sampled for each prompt.")
    eval_temperature: float | None = arg(None, "Sampling temperature; 0: greedy (default: the rollout's).")
    eval_top_p: float | None = arg(None, "Nucleus sampling (default: the rollout's).")
    eval_top_k: int | None = arg(None, "Top-k sampling (default: the rollout's).")
    eval_max_response_len: int | None = arg(None, "Longest response (default: the rollout's).")
    eval_max_prompt_len: int | None = arg(None, "Longest prompt (default: the rollout's).")
    eval_min_new_tokens: int | None = arg(None, "Shortest response.")
    eval_max_context_len: int | None = arg(None, "Longest prompt + response (default: the rollout's).")

    def __post_init__(self) -> None:
        check_positive(self, "eval_interval", "n_samples_per_eval_prompt", "eval_max_response_len")
        check_positive(self, "eval_max_prompt_len", "eval_min_new_tokens", "eval_max_context_len")
        check_not_negative(self, "eval_temperature")
        top_p, top_k = self.eval_top_p, self.eval_top_k
        check(top_p is None or 0 < top_p <= 1, "eval_top_p", "above 0 and at most 1", top_p)
        check(top_k is None or top_k == -1 or top_k > 0, "eval_top_k", "-1 or above 0", top_k)
        pairs = self.eval_prompt_data or []
        check(len(pairs) % 2 == 0, "eval_prompt_data", "pairs of a name and a file", pairs)
        names = pairs[::2]
        check(len(set(names)) == len(names), "eval_prompt_data", "pairs whose names differ", names)
        super().__post_init__()
