"""What GPUs send to each other: collectives, expert exchanges, transfers."""
