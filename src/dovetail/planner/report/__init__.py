"""Prints a plan: tables, plain data, a page, pictures, and the commands that carry it out."""
