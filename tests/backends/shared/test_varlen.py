from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slime.backends.shared.varlen import of_one_width


@pytest.mark.parametrize(("width", "value_width"), [(20, 16), (16, 20), (24, 24), (12, 5)])
def test_heads_of_one_width_attend_as_they_did_before(width: int, value_width: int) -> None:
    """The scale is that of the heads as they were; the kernel's widths are multiples of 8."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 9, width, generator=generator, dtype=torch.float64) for _ in range(2))
    value = torch.randn(1, 2, 9, value_width, generator=generator, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    wide = of_one_width(query, key, value)
    (size,) = {tensor.shape[-1] for tensor in wide}
    assert size % 8 == 0
    found = F.scaled_dot_product_attention(*wide, is_causal=True, scale=width**-0.5)
    torch.testing.assert_close(found[..., :value_width], expected, rtol=0, atol=1e-14)
    assert not found[..., value_width:].any()
