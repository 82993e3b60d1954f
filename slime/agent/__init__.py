"""Rollouts of several turns: conversations token by token, and an OpenAI-compatible front that records them."""
