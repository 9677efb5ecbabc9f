"""What all CPU kernels use: compilation, vector code, and memory."""
