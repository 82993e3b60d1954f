"""Nouns and leaf helpers; imports nothing else of slime."""
