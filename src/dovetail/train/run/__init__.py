"""A run from its run file to its end, with checkpoints."""
