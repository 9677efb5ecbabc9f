"""Bytes of memory: on one process, on the ranks of a layout, and in serving."""
