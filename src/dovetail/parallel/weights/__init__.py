"""Weights that several ranks hold: sums of gradients, shares of the optimizer, places in checkpoints."""
