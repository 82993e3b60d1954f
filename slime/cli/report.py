"""`slime report RUN_DIR`: the report of a run as one HTML file and a PNG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slime.observability.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, print where it is; 1 and one sentence on stderr where there is none to write."""
    parser = argparse.ArgumentParser(prog="slime report", description="Write the report of a run, finished or not.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run (holds metrics.jsonl)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the HTML file (default: RUN_DIR/report.html)")
    args = parser.parse_args(argv)
    try:
        paths = write_report(args.run_dir, args.output)
    except (ValueError, OSError) as error:
        print(f"slime report: {error}", file=sys.stderr)
        return 1
    print(f"report   {paths.html}\npicture  {paths.png}")
    return 0
