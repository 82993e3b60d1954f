"""The quickstart's task, reward and tiny model: adding two numbers of two digits.

A prompt is "57+68=" and its answer "521": the digits of 125 from the units up, the order in which one adds on paper,
so that each digit follows from the operands and the digits already written.

The demonstrations of the SFT warm start come from a careless teacher who mostly forgets to carry: "57+68=" -> "51".
Whoever imitates him is right where nothing is carried, a quarter of the prompts, and now and then elsewhere. Only the
reward of GRPO tells right from wrong, so what accuracy rises above the teacher's, reinforcement learning brought.

The tokenizer has one token a byte and one for each word of the ChatML frame, so a prompt is 14 tokens:

    <|im_start|> user \\n 5 7 + 6 8 = <|im_end|> \\n <|im_start|> assistant \\n   and the response   5 2 1 <|im_end|>
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    from slime.utils.types import Sample

OPERANDS = range(10, 100)
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TaskFiles(NamedTuple):
    """The jsonl files of one task.

    train, eval: {"prompt": [{"role": "user", "content": "57+68="}], "label": "521"}; no prompt is in both.
    sft: {"messages": [{"role": "user", "content": "57+68="}, {"role": "assistant", "content": "51"}]}, prompts of train.
    """

    train: Path
    sft: Path
    eval: Path


def write_task(
    directory: Path, seed: int, *, num_eval: int = 256, num_demonstrations: int = 16384, careless_fraction: float = 0.8
) -> TaskFiles:
    """Write train.jsonl, sft.jsonl and eval.jsonl into `directory` and return their paths.

    num_eval: prompts held out of the 8100; the others are train's, with one demonstration each.
    careless_fraction: share of the demonstrations whose teacher carries nothing.
    """
    if not 0 < num_eval < len(OPERANDS) ** 2:
        raise ValueError(f"num_eval must be in 1..{len(OPERANDS) ** 2 - 1}, got {num_eval}")
    rng = random.Random(seed)
    problems = [(left, right) for left in OPERANDS for right in OPERANDS]
    rng.shuffle(problems)
    held_out, training = problems[:num_eval], problems[num_eval:]
    weights = [_easiness(right) for _, right in training]
    demonstrations = [
        _demonstration(left, right, careless_answer(left, right) if rng.random() < careless_fraction else answer(left, right))
        for left, right in rng.choices(training, weights, k=num_demonstrations)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    return TaskFiles(
        train=_write_jsonl(directory / "train.jsonl", (_problem(*problem) for problem in training)),
        sft=_write_jsonl(directory / "sft.jsonl", demonstrations),
        eval=_write_jsonl(directory / "eval.jsonl", (_problem(*problem) for problem in held_out)),
    )


def answer(left: int, right: int) -> str:
    """The digits of the sum, units first: 57 + 68 = 125 is "521"."""
    return str(left + right)[::-1]


def careless_answer(left: int, right: int) -> str:
    """The column sums without any carry, units first: 57 + 68 is "51" (7+8 is 5, 5+6 is 1)."""
    return f"{(left + right) % 10}{(left // 10 + right // 10) % 10}"


async def exact_match(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 if the response is the label and nothing else, else 0.0 (a `--custom-rm-path`)."""
    return float(sample.response.removesuffix(END_OF_TURN) == sample.label)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte, so that any text survives the round trip, and a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: token_id for token_id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PADDING, "<|im_start|>", END_OF_TURN])
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=PADDING)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(directory: Path, seed: int) -> Path:
    """Save a randomly initialised Qwen3 of 100 thousand parameters and its tokenizer in Hugging Face format."""
    import torch
    from transformers import Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_tiny_config(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Sizes found by trial: the smallest that learns to add within a few hundred steps.

    initializer_range is four times the usual one, which suits a width of 64: with 0.02 learning starts half as fast.
    """
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _easiness(right: int) -> float:
    return 1.0 / ((1 + right % 10) * (1 + right // 10))


def _problem(left: int, right: int) -> dict[str, Any]:
    return {"prompt": [_turn("user", f"{left}+{right}=")], "label": answer(left, right)}


def _demonstration(left: int, right: int, response: str) -> dict[str, Any]:
    return {"messages": [_turn("user", f"{left}+{right}="), _turn("assistant", response)]}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
