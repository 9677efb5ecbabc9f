"""Measures the machine it runs on, so that plans can be made for it."""
