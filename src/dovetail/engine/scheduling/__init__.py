"""Decides who computes what in each step, and in which pages: knows no torch, so that a simulation can run it."""
