"""Probe families."""
