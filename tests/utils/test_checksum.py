from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.utils import checksum
from slime.utils.checksum import tensor_checksum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_it_is_24_digits_and_the_same_for_a_copy(dtype: torch.dtype, size: int) -> None:
    tensor = torch.arange(size).to(dtype)
    assert tensor_checksum(tensor) == tensor_checksum(tensor.clone())
    assert len(tensor_checksum(tensor)) == 24
    assert int(tensor_checksum(tensor), 16) >= 0


@pytest.mark.parametrize("words_per_chunk", [1, 1000, 1 << 24])
def test_it_does_not_depend_on_the_size_of_chunks(words_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are larger on a GPU, and checksums of both sides of a transfer must agree."""
    tensor = torch.arange(3 * 1024 if words_per_chunk == 1 else 300_001, dtype=torch.float32)
    expected = tensor_checksum(tensor)
    monkeypatch.setitem(checksum._WORDS_PER_CHUNK, "cpu", words_per_chunk)
    assert tensor_checksum(tensor) == expected


@given(values=st.lists(st.integers(-128, 127), min_size=2, max_size=40), data=st.data())
def test_one_changed_byte_or_two_that_change_places_are_noticed(values: list[int], data: st.DataObject) -> None:
    tensor = torch.tensor(values, dtype=torch.int8)
    first = data.draw(st.integers(0, len(values) - 1))
    changed = tensor.clone()
    changed[first] ^= 1
    assert tensor_checksum(changed) != tensor_checksum(tensor)
    second = data.draw(st.integers(0, len(values) - 1))
    swapped = tensor.clone()
    swapped[[first, second]] = tensor[[second, first]]
    assert (tensor_checksum(swapped) == tensor_checksum(tensor)) == torch.equal(swapped, tensor)


def test_words_that_change_places_across_chunks_are_noticed() -> None:
    tensor = torch.arange(200_000, dtype=torch.int64)
    swapped = tensor.clone()
    swapped[[5, 150_000]] = tensor[[150_000, 5]]
    assert tensor_checksum(swapped) != tensor_checksum(tensor)


def test_strides_and_storage_offset_do_not_matter() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert tensor_checksum(tensor.t().contiguous().t()) == tensor_checksum(tensor)
    shifted = torch.arange(-1, 12, dtype=torch.float32)[1:].view(3, 4)
    assert tensor_checksum(shifted) == tensor_checksum(tensor)
    transposed = tensor.t()
    assert tensor_checksum(transposed) == tensor_checksum(transposed.contiguous())


def test_type_and_shape_matter() -> None:
    tensor = torch.zeros(4, 6)
    assert len({tensor_checksum(t) for t in (tensor, tensor.view(6, 4), tensor.view(24), tensor.int())}) == 4
