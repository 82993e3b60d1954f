from __future__ import annotations

from pathlib import Path

import pytest

from slime.weight_sync import folder
from slime.weight_sync.folder import checkpoint_bytes, free_bytes, weights_root


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "shm"
    path.mkdir()
    monkeypatch.setattr(folder, "MEMORY_FILE_SYSTEM", path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return path


def test_weights_go_to_memory_where_it_has_room_for_two_versions(memory: Path) -> None:
    run_dir, free = Path("run"), free_bytes(memory)
    assert weights_root(None, run_dir, num_bytes=free // 4) == memory
    assert weights_root(None, run_dir, num_bytes=2 * free) == run_dir
    assert weights_root("named", run_dir, num_bytes=2 * free) == Path("named")


def test_without_memory_or_in_a_joined_cluster_weights_go_to_the_run_directory(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert weights_root(None, Path("run"), num_bytes=1) == Path("run")
    monkeypatch.delenv("RAY_ADDRESS")
    memory.rmdir()
    assert weights_root(None, Path("run"), num_bytes=1) == Path("run")


def test_only_one_kind_of_weight_files_counts(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 5), ("b.safetensors", 7), ("old.bin", 100), ("config.json", 3)):
        (tmp_path / name).write_bytes(bytes(size))
    assert checkpoint_bytes(str(tmp_path)) == 12
    assert checkpoint_bytes(str(tmp_path / "absent")) == 0


def test_free_space_of_a_folder_to_be_is_that_of_its_parent(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0
