"""Compares two precision recipes over several seeds."""
