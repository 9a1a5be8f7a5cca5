"""Chores on files: python -m tools.NAME."""
