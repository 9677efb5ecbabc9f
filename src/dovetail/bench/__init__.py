"""Measures servers that speak OpenAI's API: seeded requests, and the times of their answers' tokens."""
