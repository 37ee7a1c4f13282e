"""Tensors in, tensors out: the maths that everything else stands on. Imports torch only.

Shapes use the letters of the package: **B** rollouts, **T** target positions, **N** scored tokens (the completion
positions of a batch, flattened row by row), **V** vocabulary, **K** support entries. Log-probabilities are natural
logarithms (nats) and at least float32.
"""
