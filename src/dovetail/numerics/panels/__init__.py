"""Products of packed BF16 operands, by the vector or the tile instructions of a CPU."""
