"""What a user asks of a network, and how the answer is found and printed."""
