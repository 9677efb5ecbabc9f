"""The network itself, in torch, and its checkpoints."""
