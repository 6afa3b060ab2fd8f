"""Sweeps: many runs with different settings, and what they say about the fields that differ."""
