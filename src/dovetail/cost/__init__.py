"""What a model costs: parameters, FLOP, bytes of memory, and the time of single operations."""
