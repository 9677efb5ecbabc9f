"""The operations that a rank runs, listed as data."""
