"""`slime convert SOURCE TARGET`: an HF directory to a Megatron checkpoint, or a Megatron checkpoint to HF."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slime.cli.errors import reported_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code; the direction is found from what SOURCE is."""
    parser = argparse.ArgumentParser(
        prog="slime convert",
        description="Convert an HF directory to a Megatron checkpoint (torch_dist) or a Megatron checkpoint to HF.",
        epilog="Further flags are taken as Megatron's model arguments (scripts/models) and compared with config.json.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", type=_directory, help="HF directory; or folder of Megatron checkpoints, or of one of them"
    )
    parser.add_argument("target", type=Path, help="folder to write; it must not hold a model yet")
    _add_origin(parser, required=False)
    options, model_args = parser.parse_known_args(argv)
    if any(options.source.glob("*.safetensors")):
        return to_torch_dist(options.source, options.target, model_args)
    if options.origin_hf_dir is None:
        parser.error(f"--origin-hf-dir is needed: {options.source} holds no *.safetensors, so it is converted to HF")
    if model_args:
        parser.error(f"model arguments are read from --origin-hf-dir: leave out {model_args[0]}")
    return to_hf(options.source, options.target, options.origin_hf_dir)


def main_hf_to_torch_dist(argv: Sequence[str] | None = None) -> int:
    """`tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint DIR --save DIR`."""
    parser = argparse.ArgumentParser(description="An HF directory to a Megatron checkpoint.", allow_abbrev=False)
    parser.add_argument("--hf-checkpoint", type=_directory, required=True, metavar="DIR", help="HF directory to read")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder of checkpoints to write")
    options, model_args = parser.parse_known_args(argv)
    return to_torch_dist(options.hf_checkpoint, options.save, model_args)


def main_torch_dist_to_hf(argv: Sequence[str] | None = None) -> int:
    """`tools/convert_torch_dist_to_hf.py --input-dir DIR --output-dir DIR --origin-hf-dir DIR`."""
    parser = argparse.ArgumentParser(description="A Megatron checkpoint to an HF directory.", allow_abbrev=False)
    parser.add_argument(
        "--input-dir", type=_directory, required=True, metavar="DIR", help="checkpoint, or folder of them"
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="HF directory to write")
    _add_origin(parser, required=True)
    options = parser.parse_args(argv)
    return to_hf(options.input_dir, options.output_dir, options.origin_hf_dir)


def to_torch_dist(source: Path, target: Path, model_args: Sequence[str]) -> int:
    """Convert an HF directory, after its config.json agrees with the model arguments that are given."""
    with reported_errors() as outcome, _progress() as progress:
        from slime.backends.megatron_utils.convert import hf_to_torch_dist
        from slime.backends.megatron_utils.model_arguments import Given

        given = Given(model_args)
        hf_to_torch_dist(source, target, given, progress=progress)
        if given.not_compared:
            print(f"without effect here: {' '.join(given.not_compared)}", file=sys.stderr)
        print(target)
    return outcome.code


def to_hf(source: Path, target: Path, origin: Path) -> int:
    """Convert a Megatron checkpoint."""
    with reported_errors() as outcome, _progress() as progress:
        from slime.backends.megatron_utils.convert import megatron_to_hf

        megatron_to_hf(source, target, origin=origin, progress=progress)
        print(target)
    return outcome.code


def _add_origin(parser: argparse.ArgumentParser, *, required: bool) -> None:
    text = "HF directory of the same model: its config and tokenizer are copied"
    parser.add_argument("--origin-hf-dir", type=_directory, required=required, metavar="DIR", help=text)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {text}")
    return path


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Names of parameters as they are converted, one a second, on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    last = time.monotonic()

    def show(name: str) -> None:
        nonlocal last
        if time.monotonic() > last + 1:
            last = time.monotonic()
            print(name, file=sys.stderr)

    yield show
