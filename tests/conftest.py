"""Shared by all tests: property tests that are the same in every run and have no deadline of their own."""

import os
import signal

from hypothesis import settings

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # they would bury what a failing test printed; before transformers
settings.register_profile("slime", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("slime")

# A shell starts what runs in its background with SIGINT ignored, and so would every process that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
