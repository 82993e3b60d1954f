"""The maths on tensors: pure functions that import torch and nothing of slime.

Shapes: S samples, T response tokens of all of them laid end to end, G samples of one group.
"""
