"""The documented import path of `Dataset`."""

from slime.data.dataset import Dataset

__all__ = ["Dataset"]
