"""Operands of quantised products, and what happens to them."""
