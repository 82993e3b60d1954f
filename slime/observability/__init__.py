"""Compute metrics, record them, show them; imports `slime.utils` only."""
