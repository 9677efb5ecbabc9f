"""Generates text with a trained model: prefill, batched decoding, speculation, sampling."""
