"""Fabrics: their switches and links, checks, prices and drawings."""
