"""The rules of how slime is written that an import linter does not know, with their argued exceptions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.arguments import ALL_GROUPS
from slime.config.flags import reference_page

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "slime").rglob("*.py"))
MODULES = {path: ast.parse(path.read_text()) for path in SOURCES}
LONGEST_FILE, LONGEST_FUNCTION = 600, 80
SHORTEST_EXPLAINED = 3  # lines of a method

# Every failure ends somewhere; these places take any, and say why.
BROAD_EXCEPT = {
    "slime/engine/embedded/engine.py": "handed to the caller of a function that runs in the engine's thread",
    "slime/rollout/rm_hub/deadline.py": "a reward plug-in may raise anything; it fails its sample, by name",
    "slime/rollout/rm_hub/worker_process.py": "likewise, in a process of its own",
    "slime/rollout/sglang_rollout.py": "a generation function may raise anything; it fails its sample, by name",
    "slime/utils/processing_utils.py": "the tokenizers library raises plain Exception",
    "slime/agent/generate.py": "an agent may raise anything; it fails its sample, by name",
    "slime/cli/errors.py": "where every failure of a run ends",
    "slime/utils/misc.py": "a plug-in's module may raise anything",
    "slime/utils/async_utils.py": "a failure in another thread is handed to whoever waits for it",
}
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
RAY = {"slime/ray": "the layer", "slime/cli/errors.py": "takes off what Ray wraps around a cause"}
MEGATRON = {"slime/backends/megatron_utils": "its backend"}
HTTP_CLIENT = {"slime/utils/http_utils.py": "the one client", "slime/engine": "clients of the wire"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_under(path: Path, allowed: dict[str, str]) -> bool:
    return any(name_of(path) == entry or name_of(path).startswith(entry + "/") for entry in allowed)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods with their qualified names; a function inside one counts as a part of it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def definitions(
    tree: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    yield from functions(tree, prefix)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield prefix + node.name, node


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    long = {name: length for name, length in lengths.items() if length > LONGEST_FILE}
    assert long.keys() == LONG_FILES.keys(), long


def test_functions_are_short() -> None:
    lengths = {
        f"{name_of(path)}:{name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in MODULES.items()
        for name, node in functions(tree)
    }
    long = {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert long.keys() == LONG_FUNCTIONS.keys(), long


def test_every_public_thing_says_what_it_is() -> None:
    """A method may leave it to the interface that it fulfils, or be so short that its name says it all."""
    public = [
        (path, name, node)
        for path, tree in MODULES.items()
        for name, node in definitions(tree)
        if not any(part.startswith("_") for part in name.split("."))
    ]
    explained = {name.rpartition(".")[2] for _, name, node in public if "." in name and ast.get_docstring(node)}
    silent = []
    for path, name, node in public:
        outer, _, method = name.rpartition(".")
        is_plain = bool(outer) and (method in explained or (node.end_lineno or 0) - node.lineno < SHORTEST_EXPLAINED)
        if ast.get_docstring(node) is None and not is_plain:
            silent.append(f"{name_of(path)}:{name}")
    assert silent == []


def test_every_module_says_what_it_is() -> None:
    assert [name_of(path) for path, tree in MODULES.items() if ast.get_docstring(tree) is None] == []


def test_exceptions_are_caught_by_name() -> None:
    broad = {
        name_of(path)
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and not raises_again(node) and catches_all(node.type)
    }
    assert broad == BROAD_EXCEPT.keys()


def catches_all(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in ("Exception", "BaseException")) for k in kinds)


def raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether it ends in a bare `raise`: it cleans up and hides nothing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_settings_are_read_as_attributes_and_never_guessed() -> None:
    guessed = [
        f"{name_of(path)}:{node.lineno}"
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id in ("args", "cfg")
    ]
    assert guessed == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("ray", RAY), ("aiohttp", HTTP_CLIENT), ("httpx", {}), ("requests", {}), ("megatron", MEGATRON), ("sglang", {})],
)
def test_a_library_is_imported_where_it_belongs_only(package: str, allowed: dict[str, str]) -> None:
    outside = [
        name_of(path) for path, tree in MODULES.items() if package in imported(tree) and not is_under(path, allowed)
    ]
    assert outside == []


def test_nothing_sleeps_without_a_loop_around_it_in_tests() -> None:
    """A test that sleeps is slow where it need not be and fails where it must not."""
    sleeping = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"
    ]
    assert sleeping == []


def test_the_reference_of_arguments_is_what_the_settings_say() -> None:
    page = ROOT / "docs" / "reference" / "arguments.md"
    assert page.read_text() == reference_page(ALL_GROUPS), "run `make docs`"


@pytest.mark.parametrize("module", ["slime", "slime.utils.types", "slime.config", "slime.arguments"])
def test_settings_and_types_import_without_heavy_libraries(module: str) -> None:
    heavy = ["torch", "ray", "transformers", "sglang", "aiohttp", "numpy"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
