"""What a client is answered: one processor per choice, then the form that each endpoint gives it."""
