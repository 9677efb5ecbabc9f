"""Conversations: their templates, and the parts of what a model answers."""
