"""Shared by all tests: property tests that are the same in every run and have no deadline of their own."""

from hypothesis import settings

settings.register_profile("slime", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("slime")
