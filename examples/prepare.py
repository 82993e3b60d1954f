"""`python -m examples.prepare DIR`: a tiny random model and prompts for the examples."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from slime.cli.quickstart_data import make_tiny_model


def prepare(directory: Path, *, num_prompts: int = 64, seed: int = 0) -> Path:
    """Write DIR/model and DIR/prompts.jsonl: additions as chat messages, with their sums as labels."""
    rng = random.Random(seed)
    make_tiny_model(directory / "model", seed)
    pairs = [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(num_prompts)]
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{b}="}], "label": str(a + b)} for a, b in pairs]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples")))
