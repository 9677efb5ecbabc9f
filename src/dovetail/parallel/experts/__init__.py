"""Rows that go to experts on other ranks, and come back."""
