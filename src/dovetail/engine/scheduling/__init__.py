"""Decides who computes what in each step, and in which pages; without torch."""
