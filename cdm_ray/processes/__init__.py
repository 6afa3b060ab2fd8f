"""Processes: what a path is."""
