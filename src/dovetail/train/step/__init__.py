"""One optimizer step: losses, gradients, AdamW, moving average, and schedules."""
