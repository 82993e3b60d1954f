"""Log-probabilities of given prompt tokens, collected while the prompt is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from slime.engine.embedded.request import Request, TokenLogProb


class InputLogProbs:
    """What one forward pass owes to prompts: which rows of logits are wanted, and whose they are."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._wanted: list[tuple[Request, int, int]] = []

    @property
    def num_rows(self) -> int:
        """Rows of logits wanted."""
        return len(self.rows)

    def ask(self, request: Request, start: int, end: int, first: int) -> None:
        """Wants what prompt tokens [start, end), at row `first` of the pass on, predict of the request's wanted ones.

        The first wanted token has no log-probability (None), as in SGLang's answers.
        """
        if not request.wants_input_logprobs:
            return
        if not request.input_logprobs:
            request.input_logprobs.append(TokenLogProb(None, request.tokens[request.logprob_start_len]))
            request.input_top_logprobs.append(None)
        next_token = request.logprob_start_len + len(request.input_logprobs)
        low, high = max(start, next_token - 1), min(end, request.prompt_length - 1)
        if low < high:
            self.rows += range(first + low - start, first + high - start)
            self._wanted.append((request, low, high))

    def finish(self, logits: Tensor) -> None:
        """Hands the requests their log-probabilities from the wanted rows of logits, float32 [rows, V]."""
        row = 0
        for request, low, high in self._wanted:
            scaled = logits[row : row + high - low]
            row += high - low
            if not request.params.is_greedy and request.params.temperature != 1:
                scaled = scaled / request.params.temperature
            log_probs = torch.log_softmax(scaled, dim=-1)
            tokens = request.tokens[low + 1 : high + 1]
            index = torch.tensor(tokens, device=log_probs.device)[:, None]
            values = log_probs.gather(1, index)[:, 0].tolist()
            request.input_logprobs += [TokenLogProb(value, token) for value, token in zip(values, tokens, strict=True)]
            if request.top_logprobs_num:
                top = log_probs.topk(min(request.top_logprobs_num, log_probs.shape[1]), dim=-1)
                for top_values, top_tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                    pairs = zip(top_values, top_tokens, strict=True)
                    request.input_top_logprobs.append([TokenLogProb(value, token) for value, token in pairs])
