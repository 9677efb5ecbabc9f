"""Published numbers beside ours: counts, predictions and experiments."""
