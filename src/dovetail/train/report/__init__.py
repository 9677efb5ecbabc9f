"""What a run reports: metrics, a live display, pictures, and the health of operands."""
