"""Losses, advantages and weights: pure functions over token tensors."""
