"""Prompts to scored samples."""
