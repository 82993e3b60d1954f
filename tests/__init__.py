"""A package by name, so that the `tests` of a Megatron-LM checkout on the path is not taken for it."""
