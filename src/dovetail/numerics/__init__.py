"""Arithmetic in small formats: rounding, quantised products, and their kernels."""
