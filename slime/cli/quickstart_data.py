"""The quickstart's task, reward and tiny model: adding two numbers of two digits.

A prompt is "57+68=" and its answer "521": the digits of 125 from the units up, the order in which one adds on paper,
so that each digit follows from the operands and the digits before it. An answer is right or wrong as a whole.

The demonstrations of the SFT warm start come from a careless teacher, who has two columns to add and nearly always
stops after two digits: "57+68=" -> "52". Whoever imitates him is right where the sum is below 100, 40% of the prompts,
and hardly ever elsewhere. Only the reward of GRPO says so: accuracy above the teacher's is due to reinforcement.

The tokenizer has one token for each byte and one for each word of the ChatML frame, so a prompt is 14 tokens:

    <|im_start|> user \\n 5 7 + 6 8 = <|im_end|> \\n <|im_start|> assistant \\n    and its answer    5 2 1 <|im_end|>
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

CARELESS_SHARE = 0.875  # of the demonstrations; the eighth is what GRPO discovers
EASY_SHARE = 0.4  # of the demonstrations, the first ones
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Problem(NamedTuple):
    """Two numbers to add, each in 10..99."""

    left: int
    right: int


class TaskFiles(NamedTuple):
    """The jsonl files of one task.

    train, eval: {"prompt": [{"role": "user", "content": "57+68="}], "label": "521"}; no prompt is in both.
    sft: {"messages": [{"role": "user", "content": "57+68="}, {"role": "assistant", "content": "52"}]}; train's prompts,
        to be read once, in file order: the easy ones come first.
    """

    train: Path
    sft: Path
    eval: Path


def write_task(directory: Path, seed: int, *, num_demonstrations: int = 28_800, num_eval: int = 256) -> TaskFiles:
    """Write train.jsonl, sft.jsonl and eval.jsonl into `directory`; equal seeds give equal files.

    num_eval: prompts held out of the 8100; all others are in train, and demonstrations are drawn from those.
    """
    problems = [Problem(left, right) for left in range(10, 100) for right in range(10, 100)]
    if not 0 < num_eval < len(problems):
        raise ValueError(f"num_eval must be in 1..{len(problems) - 1}, got {num_eval}")
    rng = random.Random(seed)
    rng.shuffle(problems)
    held_out, training = problems[:num_eval], problems[num_eval:]
    directory.mkdir(parents=True, exist_ok=True)
    return TaskFiles(
        train=_write_jsonl(directory / "train.jsonl", (_task_row(problem) for problem in training)),
        sft=_write_jsonl(directory / "sft.jsonl", _demonstrations(training, num_demonstrations, rng)),
        eval=_write_jsonl(directory / "eval.jsonl", (_task_row(problem) for problem in held_out)),
    )


def answer(problem: Problem) -> str:
    """The digits of the sum, units first: 57 + 68 = 125 is "521"."""
    return str(problem.left + problem.right)[::-1]


def careless_answer(problem: Problem) -> str:
    """The answer of one who stops after two digits: 57 + 68 is "52"."""
    return answer(problem)[:2]


async def exact_match(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1.0 if the response is the label and nothing else, else 0.0 (a `--custom-rm-path`)."""
    return float(sample.response.removesuffix(END_OF_TURN) == sample.label)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows each byte, so that any text survives the round trip, with a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: token_id for token_id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PADDING, "<|im_start|>", END_OF_TURN])
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=PADDING)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_tiny_model(directory: Path, seed: int) -> Path:
    """Save a Qwen3 of 91 thousand random parameters and its tokenizer in Hugging Face format; returns `directory`."""
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
    """The smallest shape found to learn addition in a few hundred steps.

    Against Qwen3's defaults, a wider initialisation (a width of 64 needs it) and a smaller rope base (prompts have 20
    tokens, not 20 thousand) halve the steps until the loss begins to fall.
    """
    from transformers import Qwen3Config

    token_ids = tokenizer.get_vocab()
    return Qwen3Config(
        vocab_size=len(token_ids),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token_ids[END_OF_TURN],
        pad_token_id=token_ids[PADDING],
        dtype="float32",
    )


def _demonstrations(problems: list[Problem], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """`count` conversations with the careless teacher, the first `EASY_SHARE` of them mostly easy."""
    num_easy = int(EASY_SHARE * count)
    chosen = rng.choices(problems, [_easiness(problem) for problem in problems], k=num_easy)
    chosen += rng.choices(problems, k=count - num_easy)
    teachers = (careless_answer if rng.random() < CARELESS_SHARE else answer for _ in chosen)
    return [
        {"messages": [_turn("user", _question(problem)), _turn("assistant", teacher(problem))]}
        for problem, teacher in zip(chosen, teachers, strict=True)
    ]


def _easiness(problem: Problem) -> float:
    """Weight of a problem among the easy ones: high where the digits to be added are small.

    Over all problems, a digit of the sum (modulo 10) tells nothing of either operand's digit alone, and learning stalls
    until both are looked at; where most added digits are small the sum resembles the left operand, which is a start.
    """
    tens, units = divmod(problem.right, 10)
    return float(((1 + tens) * (1 + units)) ** -1.5)


def _task_row(problem: Problem) -> dict[str, Any]:
    return {"prompt": [_turn("user", _question(problem))], "label": answer(problem)}


def _question(problem: Problem) -> str:
    return f"{problem.left}+{problem.right}="


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
