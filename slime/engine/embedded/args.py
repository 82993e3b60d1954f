"""What an engine process is told at its start. Flags bear SGLang's names wherever SGLang has one."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field whose flag is `--its-name`, with `help` and argparse `options`."""
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class ServerArgs:
    """The settings of one engine."""

    model_path: str = field(metadata={"help": "folder of a Hugging Face checkpoint"})
    tokenizer_path: str | None = flag(None, "folder of the tokenizer; default: the model's")
    served_model_name: str | None = flag(None, "name in /v1/models; default: the model path")
    trust_remote_code: bool = flag(False, "let the checkpoint's own Python code run")
    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(30000, "port to listen on")
    api_key: str | None = flag(None, "clients must send `Authorization: Bearer KEY`")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "auto: the checkpoint's")
    context_length: int | None = flag(None, "longest prompt plus answer, in tokens; default: the model's")
    max_running_requests: int = flag(256, "requests that decode at once; the others queue")
    max_total_tokens: int | None = flag(None, "tokens that the key-value cache holds; default: by memory")
    mem_fraction_static: float = flag(0.3, "share of the free memory that the key-value cache may take")
    chunked_prefill_size: int = flag(4096, "most prompt tokens in one forward pass")
    num_threads: int | None = flag(None, "CPU threads of the model; default: torch's")
    enable_return_routed_experts: bool = flag(False, "answer which experts each token had, where a request asks")
    disable_radix_cache: bool = flag(False, "compute every prompt anew")
    enable_deterministic_inference: bool = flag(
        False, "one answer per seed whatever runs beside it; on by itself for float32 on a CPU"
    )
    watchdog_timeout: float = flag(
        300.0, "seconds that one step, or one command, may take before /health answers that the engine is stuck"
    )
    min_step_ms: float = flag(0.0, "shortest time of one forward pass: stands for a larger model in benchmarks")
    weight_version: str = flag("default", "version reported until the first weight update names another")
    random_seed: int | None = flag(None, "seed of requests that bring none; default: drawn at start")
    log_level: Literal["debug", "info", "warning", "error"] = flag("info", "lowest level that is logged")

    def __post_init__(self) -> None:
        at_least_one = (
            "context_length",
            "max_running_requests",
            "max_total_tokens",
            "chunked_prefill_size",
            "num_threads",
        )
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.min_step_ms < 0:
            raise ValueError(f"--min-step-ms must be 0 or more, got {self.min_step_ms}.")
        if self.watchdog_timeout <= 0:
            raise ValueError(f"--watchdog-timeout must be above 0, got {self.watchdog_timeout}.")
        if not 0.0 < self.mem_fraction_static < 1.0:
            raise ValueError(f"--mem-fraction-static must lie between 0 and 1, got {self.mem_fraction_static}.")
        if not 0 < self.port < 65536:
            raise ValueError(f"--port must lie between 1 and 65535, got {self.port}.")


def parse_server_args(arguments: list[str] | None = None) -> ServerArgs:
    """The settings that a command line names (default: this process's); ends the process on an unknown flag."""
    parser = argparse.ArgumentParser(prog="python -m slime.engine.embedded.server", allow_abbrev=False)
    for item in dataclasses.fields(ServerArgs):
        parser.add_argument("--" + item.name.replace("_", "-"), **_argparse_options(item))
    try:
        return ServerArgs(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


def _argparse_options(item: dataclasses.Field[Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"help": item.metadata["help"]}
    if item.default is dataclasses.MISSING:
        return options | {"required": True}
    annotation = str(item.type)
    if annotation == "bool":
        return options | {"action": "store_true"}
    if annotation.startswith("Literal"):
        options["choices"] = [choice.strip(" \"'") for choice in annotation[len("Literal[") : -1].split(",")]
    elif annotation.startswith("int"):
        options["type"] = int
    elif annotation.startswith("float"):
        options["type"] = float
    return options | {"default": item.default}
