"""The rules between settings, one module for each matter.

A rule returns the settings that follow from others; it raises ConfigError where settings contradict each other.
`slime.config.validate` applies them in order.
"""
