"""Arrays among JSON: `{"base64": the bytes, "dtype": numpy's, "shape": [...]}`, exactly as they were."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_json(array: NDArray[Any] | None) -> dict[str, Any] | None:
    """`array` in JSON's types; None as it is."""
    if array is None:
        return None
    return {"base64": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": list(array.shape)}


def from_json(value: Any) -> Any:
    """The inverse; what is no such dict as it is."""
    if not (isinstance(value, dict) and "base64" in value):
        return value
    import numpy as np

    flat = np.frombuffer(base64.b64decode(value["base64"]), dtype=value["dtype"])
    return flat.reshape(value["shape"]).copy()
