"""200 steps of the quickstart's task with SGLang and FSDP2 colocated: memory of the host and of the GPU, step by step.

    python -m benchmarks.gpu.leaks [--steps 200] [--output runs/benchmark-leaks] [--flags ...]

Host: what the run's processes hold alone (unique set size) plus what lies in /dev/shm. GPU: what `nvidia-smi` counts
for these processes, or all that is in use where it names none. Rewards are random. Prints the mean of windows of
steps, and what the second half of them has over steps 20 to 39; exit code 1 where that is more than 2% or 100 MiB.
Flags after --flags go to slime; `--device cpu` among them measures a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import psutil
from rich.console import Console
from rich.table import Table

from slime.cli.quickstart import grpo_settings, new_directory, write_settings
from slime.cli.quickstart_data import make_tiny_model, write_task

SETTLED = 20
MAY_GROW_MIB, MAY_GROW = 100.0, 0.02
POLL_S = 0.5


def main() -> None:
    """Runs, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-leaks"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    if options.steps < 4 * SETTLED:
        parser.error(f"--steps must be at least {4 * SETTLED}")
    new_directory(options.output)
    files = write_task(options.output / "data", 0)
    settings = grpo_settings(options.output, files, 0) | {
        "hf_checkpoint": str(make_tiny_model(options.output / "model", 0)),
        "device": "cuda",
        "rollout_engine": "auto",
        "num_rollout": options.steps,
        "custom_rm_path": None,
        "rm_type": "random",
        "eval_interval": None,
        "eval_prompt_data": None,
        "save": None,
        "save_hf": None,
        "run_dir": str(options.output / "run"),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    config = write_settings(options.output / "settings.yaml", settings)
    process = subprocess.Popen([sys.executable, "train.py", "--config", str(config), *options.flags])
    readings = watch(process, options.output / "run" / "metrics.jsonl")
    if process.returncode:
        sys.exit(process.returncode)
    sys.exit(0 if report(readings) else 1)


def watch(process: subprocess.Popen[bytes], metrics: Path) -> dict[int, tuple[float, float]]:
    """MiB of host and GPU after each step that was seen, until the run ends."""
    readings: dict[int, tuple[float, float]] = {}
    while process.poll() is None:
        time.sleep(POLL_S)
        step = last_step(metrics)
        if step is not None and step not in readings:
            family = [root := psutil.Process(process.pid), *root.children(recursive=True)]
            readings[step] = host_mib(family), gpu_mib({member.pid for member in family})
    return readings


def last_step(metrics: Path) -> int | None:
    """The last step that is in the file."""
    if not metrics.exists():
        return None
    lines = metrics.read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if row["axis"] == "train/step"]
    return steps[-1] if steps else None


def host_mib(family: list[psutil.Process]) -> float:
    """Memory of processes, pages that they share left out, plus that of /dev/shm."""
    total = shutil.disk_usage("/dev/shm").used
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().uss
    return total / 2**20


def gpu_mib(pids: set[int]) -> float:
    """Memory that processes `pids` use on GPUs; 0 where there is none."""
    if shutil.which("nvidia-smi") is None:
        return 0.0
    rows = [row.split(",") for row in ask("--query-compute-apps=pid,used_memory")]
    ours = [float(used) for pid, used in rows if int(pid) in pids and used.strip().isdigit()]
    return sum(ours) if ours else sum(map(float, ask("--query-gpu=memory.used")))


def ask(query: str) -> list[str]:
    """Lines of an answer of nvidia-smi."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()


def report(readings: dict[int, tuple[float, float]]) -> bool:
    """Prints windows of 20 steps. Whether memory was flat."""
    last = max(readings)
    table = Table(title=f"Memory of {last + 1} steps, MiB")
    for name in ("steps", "host", "GPU"):
        table.add_column(name, justify="right")
    for first in range(0, last + 1, SETTLED):
        inside = [value for step, value in readings.items() if first <= step < first + SETTLED]
        if inside:
            host, gpu = (mean(side) for side in zip(*inside, strict=True))
            table.add_row(f"{first} to {min(first + SETTLED - 1, last)}", f"{host:,.0f}", f"{gpu:,.0f}")
    early = [value for step, value in readings.items() if SETTLED <= step < 2 * SETTLED]
    late = [value for step, value in readings.items() if step > last // 2]
    is_flat, growth = True, []
    for before, after in zip(zip(*early, strict=True), zip(*late, strict=True), strict=True):
        grown = mean(after) - mean(before)
        growth.append(f"{grown:+,.0f}")
        is_flat = is_flat and grown <= max(MAY_GROW_MIB, MAY_GROW * mean(before))
    table.add_row("second half over 20 to 39", *growth)
    Console(width=100).print(table)
    return is_flat


if __name__ == "__main__":
    main()
