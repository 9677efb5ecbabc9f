"""Exchanges between GPUs on a simulated network."""
