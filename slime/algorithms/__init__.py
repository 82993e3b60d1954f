"""The maths on tensors: pure functions that import torch and nothing of slime but each other.

Shapes: S samples, T response tokens of all of them laid end to end, G samples of one group.

Log-probs and values at masked tokens may be anything. A function that takes the mask lets none of it into its results
or gradients. One that does not works token by token: its caller puts 0 there first (`torch.where`, for 0 * NaN is NaN).
"""
