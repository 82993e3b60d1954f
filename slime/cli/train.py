"""`slime train`: parse, check, run; what the user got wrong ends in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from slime.arguments import parse_args
from slime.backends.megatron_utils.extra_args import ExtraArgsProvider
from slime.cli.errors import reported_errors
from slime.cli.preflight import preflight
from slime.config.validate import check_loop


def main(
    argv: Sequence[str] | None = None,
    *,
    is_async: bool = False,
    extra_args_provider: ExtraArgsProvider | None = None,
) -> int:
    """Exit code: 0 done, 1 failed, 2 wrong settings, 130 interrupted. is_async: sample one rollout ahead.

    extra_args_provider: as `parse_args` takes it.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # plug-ins beside the user
    with reported_errors() as outcome:
        args = parse_args(argv, extra_args_provider=extra_args_provider)
        check_loop(args, is_async=is_async)
        findings = preflight(args)
        if args.dry_run:
            from slime.cli.dry_run import print_plan

            print_plan(args, findings)
            return 0
        from slime.driver import train
        from slime.ray.job import run_directory

        outcome.log_dir = run_directory(args)
        run_dir = train(args, is_async=is_async)
        print(f"run directory: {run_dir}")
    return outcome.code
