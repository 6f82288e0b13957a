"""A run in small, before it is made in large."""
