"""Feed-forward layers: SwiGLU, the gate, and the routed and shared experts."""
