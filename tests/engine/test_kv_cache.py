"""The page pool."""

from __future__ import annotations

import pytest
import torch

from slime.engine.embedded.kv_cache import DUMMY_PAGE, PAGE_SIZE, KVCache, OutOfPages


def make_cache(num_pages: int = 8) -> KVCache:
    return KVCache(2, 3, 4, num_tokens=num_pages * PAGE_SIZE, dtype=torch.float32, device=torch.device("cpu"))


def test_a_page_is_free_again_when_its_last_reference_goes() -> None:
    cache = make_cache()
    pages = cache.allocate(3)
    cache.share(pages[:1])
    cache.free(pages)
    assert cache.num_free_pages == 7
    cache.free(pages[:1])
    assert cache.num_free_pages == 8


def test_all_or_no_pages_are_handed_out() -> None:
    cache = make_cache()
    with pytest.raises(OutOfPages, match="9 pages wanted, 8 free"):
        cache.allocate(9)
    assert sorted(cache.allocate(8)) == list(range(1, 9))


def test_the_dummy_page_is_never_handed_out() -> None:
    assert DUMMY_PAGE not in make_cache().allocate(8)


def test_new_memory_is_zero_and_cleared_memory_too() -> None:
    cache = make_cache()
    page = cache.allocate(1)[0]
    assert not cache.layer(1).any()
    cache.layer(1)[:, :, page] = float("nan")
    cache.clear()
    assert not cache.layer(1).any()


def test_copied_pages_hold_the_same_in_all_layers() -> None:
    cache = make_cache()
    source, other, target, second = cache.allocate(4)
    for layer in range(2):
        cache.layer(layer).normal_()
    cache.copy_pages([source, other], [target, second])
    for layer in range(2):
        assert torch.equal(cache.layer(layer)[:, :, target], cache.layer(layer)[:, :, source])
        assert torch.equal(cache.layer(layer)[:, :, second], cache.layer(layer)[:, :, other])


def test_released_memory_is_gone_until_taken_again() -> None:
    cache = make_cache()
    cache.release_memory()
    assert not cache.has_memory
    cache.allocate_memory()
    assert cache.layer(0).shape == (2, 3, 9, PAGE_SIZE, 4)


def test_memory_in_use_is_not_released() -> None:
    cache = make_cache()
    cache.allocate(1)
    with pytest.raises(AssertionError, match="1 pages still in use"):
        cache.release_memory()
