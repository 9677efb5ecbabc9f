"""Runs the model on the rows of a step, over a cache in pages: prompts together, decoding together."""
