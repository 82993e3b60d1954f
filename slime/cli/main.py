"""`slime COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """module: has `main(argv) -> int`; imported when the command is chosen, so that `--help` stays instant."""

    module: str
    help: str


COMMANDS = {
    "train": Command("slime.cli.train", "post-train a model; every setting is a flag"),
    "train-async": Command("slime.cli.train_async", "the same, engines sampling one rollout ahead of the trainers"),
    "quickstart": Command("slime.cli.quickstart", "a tiny model learns arithmetic, in minutes, on a CPU"),
    "replay": Command("slime.cli.replay", "repeat one training step of a run from its dumps"),
    "convert": Command("slime.cli.convert", "an HF directory to a Megatron checkpoint, or back"),
    "report": Command("slime.cli.report", "one HTML page and a picture of a run"),
}


def main() -> int:
    """Exit code of the chosen command."""
    argv = sys.argv[1:]
    if argv and argv[0] in COMMANDS:
        try:
            return int(importlib.import_module(COMMANDS[argv[0]].module).main(argv[1:]))
        except KeyboardInterrupt:  # of imports, which take seconds
            print("interrupted", file=sys.stderr)
            return 130
    lines = [f"  {name:12} {command.help}" for name, command in COMMANDS.items()]
    print(
        "usage: slime COMMAND ...\n\n" + "\n".join(lines), file=sys.stdout if argv in ([], ["--help"]) else sys.stderr
    )
    if argv in ([], ["-h"], ["--help"]):
        return 0
    print(f"\nerror: there is no command {argv[0]!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
