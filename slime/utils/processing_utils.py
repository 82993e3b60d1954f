"""Loading tokenizers and multimodal processors from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


def load_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of the Hugging Face directory `path`; `kwargs` go to `AutoTokenizer.from_pretrained`.

    Raises ValueError, with the path and the reason, where the directory is missing or holds no readable tokenizer.
    """
    _check_directory(path, "tokenizer")
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, path, "tokenizer", kwargs)
    return tokenizer


def load_processor(path: str | Path, **kwargs: Any) -> ProcessorMixin:
    """The multimodal processor of the Hugging Face directory `path`; errors as in `load_tokenizer`."""
    _check_directory(path, "processor")
    from transformers import AutoProcessor

    processor: ProcessorMixin = _load(AutoProcessor, path, "processor", kwargs)
    return processor


def _check_directory(path: str | Path, kind: str) -> None:
    if not Path(path).is_dir():
        raise ValueError(f"{kind}: {str(path)!r} is not a directory. Give the path of a downloaded Hugging Face model.")


def _load(auto_class: Any, path: str | Path, kind: str, kwargs: dict[str, Any]) -> Any:
    try:
        return auto_class.from_pretrained(str(path), **kwargs)
    except Exception as error:  # the Rust tokenizers library raises plain Exception for a malformed file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{kind}: cannot be loaded from {str(path)!r} ({reason})") from error
