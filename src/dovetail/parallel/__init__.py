"""How work is divided among ranks."""
