"""What a client may ask for: one class per endpoint, and what is refused by name."""
