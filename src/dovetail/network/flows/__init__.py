"""Flows that share links: their rates, and when they end."""
