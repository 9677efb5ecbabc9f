"""Which links a flow takes."""
