"""Small number formats: rounding and quantising to them, and their errors."""
