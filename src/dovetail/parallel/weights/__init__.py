"""Weights that several ranks hold: their gradients, the shares of their optimizer, their places in checkpoints."""
