"""Readers shared by probing tasks and training."""
